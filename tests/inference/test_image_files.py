"""Image files in and out: what is kept, in which formats, and what bad files say."""

import errno
import io
import shutil
import struct
import types
import zlib

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms, ImageOps

from gigagan_jax.core.errors import UserError
from gigagan_jax.inference import image_reader, image_writer
from gigagan_jax.inference.image_reader import read_image, read_size
from gigagan_jax.inference.image_writer import ImageWriter, OutputImage, check_output, fit_format

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def smooth(height, width, channels, dtype=np.uint8):
    y, x = np.mgrid[:height, :width]
    planes = [(np.sin(x / (7 + c)) + np.cos(y / (5 + c)) + 2) / 4 * np.iinfo(dtype).max for c in range(channels)]
    return np.stack(planes, -1).astype(dtype)


def write(path, pixels, bands=3, overwrite=False, **metadata):
    height, width, channels = pixels.shape
    image = OutputImage(height, width, channels, 8 * pixels.itemsize, **metadata)
    with ImageWriter(path, image, overwrite) as writer:
        for band in np.array_split(pixels, bands):
            writer.write(band)
    return path


# writing and reading back


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_every_sample_comes_back(tmp_path, ending, channels, dtype):
    for pixels in (noise(70, 33, channels, dtype=dtype), smooth(131, 40, channels, dtype), noise(1, 1, channels)):
        path = write(tmp_path / f"x{ending}", pixels, bands=min(3, len(pixels)), overwrite=True, icc=SRGB)
        if ending == ".tif" and channels == 2 and pixels.dtype == np.uint16:
            # Pillow cannot read it.
            np.testing.assert_array_equal(tifffile.imread(path), pixels)
            continue
        image = read_image(path)
        assert image.pixels.dtype == pixels.dtype
        np.testing.assert_array_equal(image.pixels, pixels)
        assert image.icc == SRGB
        assert read_size(path) == pixels.shape[:2]
    assert [f.name for f in tmp_path.iterdir()] == [f"x{ending}"]


@pytest.mark.parametrize("channels", [1, 3])
def test_parity_of_16_bits_with_tifffile(tmp_path, channels):
    pixels = noise(50, 31, channels, dtype=np.uint16)
    # Written here and read there.
    np.testing.assert_array_equal(tifffile.imread(write(tmp_path / "ours.tif", pixels)).reshape(pixels.shape), pixels)
    # Written there in both byte orders, and read here.
    for order in "<>":
        tifffile.imwrite(tmp_path / "theirs.tif", np.squeeze(pixels), byteorder=order)
        np.testing.assert_array_equal(read_image(tmp_path / "theirs.tif").pixels, pixels)


def test_png_of_8_bits_is_what_pillow_reads(tmp_path):
    pixels = smooth(130, 57, 3)
    path = write(tmp_path / "x.png", pixels, exif=b"MM\0*\0\0\0\x08\0\0\0\0\0\0", text={"prompt": "naïve 猫"})
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert image.text == {"prompt": "naïve 猫"}
        assert "exif" in image.info
    # Filtered: the samples of a smooth image take less room than themselves.
    assert path.stat().st_size < pixels.nbytes / 2


@pytest.mark.parametrize("ending, channels", [(".jpg", 1), (".jpg", 3), (".webp", 3), (".webp", 4)])
def test_lossy_formats_keep_the_picture(tmp_path, ending, channels):
    pixels = smooth(96, 64, channels)
    path = write(tmp_path / f"x{ending}", pixels, icc=SRGB)
    image = read_image(path)
    assert image.pixels.shape == pixels.shape
    assert np.abs(image.pixels.astype(int) - pixels).mean() < 3
    assert image.icc == SRGB


def test_what_a_format_cannot_hold_is_said():
    image = OutputImage(4, 4, 4, 16)
    output, notes = fit_format(image, "JPEG")
    assert (output.channels, output.depth) == (3, 8)
    assert notes == ("JPEG has 8 bits a channel", "JPEG has no transparency: the image is laid over white")
    output, notes = fit_format(image, "WEBP")
    assert (output.channels, output.depth, len(notes)) == (4, 8, 1)
    assert fit_format(image, "PNG") == (image, ())
    assert fit_format(OutputImage(4, 4, 1, icc=bytes(16) + b"GRAY"), "WEBP")[0].icc is None
    assert fit_format(OutputImage(4, 4, 3, exif=b"x"), "TIFF")[1] == ("EXIF data is not kept in TIFF",)


def test_exif_that_is_too_long_for_jpeg_is_left_out(tmp_path):
    for size, kept in ((65527, True), (65528, False)):
        image, notes = fit_format(OutputImage(4, 4, 3, exif=bytes(size)), "JPEG")
        assert (image.exif is not None) is kept
        assert notes == (() if kept else ("EXIF data is too long for JPEG and left out",))
        with ImageWriter(tmp_path / f"{size}.jpg", image) as writer:
            writer.write(noise(4, 4, 3))


# what the reader makes of files


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_orientation_is_applied_once(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Camera"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.5
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] = 5
    Image.fromarray(smooth(40, 56, 3)).save(tmp_path / f"x.{ending}", exif=exif, quality=95)
    image = read_image(tmp_path / f"x.{ending}")
    with Image.open(tmp_path / f"x.{ending}") as opened:
        np.testing.assert_array_equal(image.pixels, np.asarray(ImageOps.exif_transpose(opened)))
    assert read_size(tmp_path / f"x.{ending}") == image.pixels.shape[:2]
    # Written again, the file says that it is upright, and by what camera it is.
    with Image.open(write(tmp_path / f"y.{ending}", image.pixels, exif=image.exif)) as written:
        kept = written.getexif()
    assert ExifTags.Base.Orientation not in kept
    assert kept[ExifTags.Base.Make] == "Camera"
    details = kept.get_ifd(ExifTags.IFD.Exif)
    assert details[ExifTags.Base.ExposureTime] == 0.5
    assert ExifTags.Base.ExifImageWidth not in details


def test_palette_grey_one_bit_and_cmyk(tmp_path):
    rgb = Image.fromarray(smooth(20, 30, 3))
    palette = rgb.quantize(16)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_image(tmp_path / "p.png").pixels, np.asarray(palette.convert("RGB")))
    palette.save(tmp_path / "t.png", transparency=0)
    image = read_image(tmp_path / "t.png")
    assert image.pixels.shape == (20, 30, 4)
    np.testing.assert_array_equal(image.alpha[..., 0] == 0, np.asarray(palette) == 0)
    rgb.convert("1").save(tmp_path / "one.png")
    assert set(np.unique(read_image(tmp_path / "one.png").pixels)) == {0, 255}
    rgb.convert("L").save(tmp_path / "g.png", transparency=7)
    assert read_image(tmp_path / "g.png").pixels.shape == (20, 30, 2)
    rgb.convert("CMYK").save(tmp_path / "c.jpg", icc_profile=b"a profile of inks")
    image = read_image(tmp_path / "c.jpg")
    assert image.pixels.shape == (20, 30, 3)
    # The profile of the inks does not describe the RGB values.
    assert image.icc is None
    assert image.notes == ("CMYK is converted to RGB",)


def test_one_transparent_colour_of_16_bits(tmp_path):
    pixels = noise(9, 8, 3, dtype=np.uint16)
    path = write(tmp_path / "x.png", pixels)
    data = path.read_bytes()
    key = tuple(int(v) for v in pixels[2, 3])
    chunk = b"tRNS" + np.array(key, ">u2").tobytes()
    at = data.index(b"IDAT") - 4
    path.write_bytes(data[:at] + struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at:])
    image = read_image(path)
    np.testing.assert_array_equal(image.color, pixels)
    assert np.argwhere(image.alpha[..., 0] == 0).tolist() == [[2, 3]]


def test_a_tiff_keeps_what_describes_the_picture(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.5
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    opened = Image.Exif()
    opened.load(data)
    opened[ExifTags.Base.ImageWidth] = 8
    block = image_reader._exif_block(image_reader._descriptive_exif(opened))
    kept = Image.Exif()
    kept.load(block)
    assert set(kept) == {ExifTags.Base.Make, ExifTags.IFD.Exif}
    assert kept.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] == 0.5
    write(tmp_path / "plain.tif", smooth(8, 8, 3))
    assert read_image(tmp_path / "plain.tif").exif is None


def test_pgm_of_16_bits(tmp_path):
    pixels = noise(5, 6, 1, dtype=np.uint16)
    (tmp_path / "x.pgm").write_bytes(b"P5 6 5 65535\n" + pixels.astype(">u2").tobytes())
    np.testing.assert_array_equal(read_image(tmp_path / "x.pgm").pixels, pixels)


def test_first_frame_of_several(tmp_path):
    frames = [Image.fromarray(smooth(8, 8, 3) // (i + 1)) for i in range(2)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    image = read_image(tmp_path / "x.gif")
    assert image.pixels.shape == (8, 8, 3)
    assert "only the first frame is read" in image.notes


# bad files


def read_error(path):
    with pytest.raises(UserError) as error:
        read_image(path)
    line = str(error.value)
    assert str(path) in line
    assert "\n" not in line
    return line


def test_bad_input_is_one_line(tmp_path):
    file = tmp_path / "x.png"
    assert "does not exist" in read_error(file)
    assert "Is a directory" in read_error(tmp_path)
    for data in (b"", b"hello", b"\x89PNG\r\n\x1a\n"):
        file.write_bytes(data)
        assert "not an image" in read_error(file)
    whole = write(tmp_path / "whole.png", noise(60, 60, 3), overwrite=True).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in read_error(file)
    sixteen = write(tmp_path / "sixteen.png", noise(60, 60, 3, dtype=np.uint16)).read_bytes()
    file.write_bytes(sixteen[: len(sixteen) // 2])
    assert "truncated" in read_error(file)
    buffer = io.BytesIO()
    Image.fromarray(noise(60, 60, 3)).save(buffer, "JPEG")
    file.write_bytes(buffer.getvalue()[:900])
    assert "truncated" in read_error(file)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    assert "32 bits a channel" in read_error(tmp_path / "f.tif")


def test_no_pixels_and_too_many(tmp_path):
    def png(width, height):
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 9) + b"IDAT"
        return b"\x89PNG\r\n\x1a\n" + data + bytes(40)

    file = tmp_path / "x.png"
    file.write_bytes(png(0, 0))
    read_error(file)
    file.write_bytes(png(60_000, 60_000))
    assert "60000 x 60000: at most 268 million pixels" in read_error(file)
    limit = Image.MAX_IMAGE_PIXELS
    # Wide is not large.
    Image.new("RGB", (60_000, 2)).save(file)
    assert read_image(file).pixels.shape == (2, 60_000, 3)
    assert limit == Image.MAX_IMAGE_PIXELS


# output that cannot be written


def check_error(path, image, overwrite=False):
    with pytest.raises(UserError) as error:
        check_output(path, image, overwrite)
    return str(error.value)


def test_output_is_checked_before_the_work(tmp_path, monkeypatch):
    small = OutputImage(8, 8, 3)
    (tmp_path / "x.png").write_bytes(b"mine")
    assert "exists: --overwrite" in check_error(tmp_path / "x.png", small)
    check_output(tmp_path / "x.png", small, True)
    assert "must end in one of .png" in check_error(tmp_path / "x.bmp", small)
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in check_error(tmp_path / "folder.png", small)
    assert "JPEG (65500 pixels a side): write .tif or .png" in check_error(
        tmp_path / "w.jpg", OutputImage(8, 240_000, 3)
    )
    assert "WEBP (16383 pixels a side)" in check_error(tmp_path / "w.webp", OutputImage(20_000, 8, 3))
    assert "TIFF (4 GB): write .png" in check_error(tmp_path / "w.tif", OutputImage(60_000, 60_000, 3))
    assert "cannot be made" in check_error(tmp_path / "x.png" / "sub" / "y.png", small)
    check_output(tmp_path / "new" / "deep" / "y.png", small, False)
    assert (tmp_path / "new" / "deep").is_dir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10_000))
    assert "needs about 150 kB, and the disk has 10 kB free" in check_error(
        tmp_path / "y.png", OutputImage(1000, 100, 3)
    )


@pytest.mark.parametrize("ending", [".png", ".tif", ".jpg"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, ending):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 2000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(image_writer, "open", lambda path, mode: Full(path, mode), raising=False)
    with pytest.raises(UserError, match=r"no room on the disk for .*x\.") as error:
        write(tmp_path / f"x{ending}", noise(200, 200, 3))
    assert error.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"mine")

    def stop_halfway():
        with ImageWriter(path, OutputImage(8, 8, 3), overwrite=True) as writer:
            writer.write(noise(4, 8, 3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    assert path.read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 1


def write_as(path, image, band):
    with ImageWriter(path, image) as writer:
        writer.write(band)


def test_wrong_bands_are_refused(tmp_path):
    image = OutputImage(8, 8, 3)
    for bad in (noise(4, 7, 3), noise(4, 8, 4), noise(4, 8, 3, dtype=np.uint16), noise(9, 8, 3)):
        with pytest.raises(ValueError, match=r"for rows of uint8 8 pixels|row 9 of 8"):
            write_as(tmp_path / "x.png", image, bad)
    with pytest.raises(ValueError, match="4 rows of 8"):
        write_as(tmp_path / "x.png", image, noise(4, 8, 3))
    assert list(tmp_path.iterdir()) == []
