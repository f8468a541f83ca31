"""Openly licensed photographs inside packages of Debian and PyPI. What is drawn or rendered there is not listed."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Photograph:
    """One photograph.

    Attributes:
      package: the Debian package or PyPI distribution that holds it.
      path: its file name in there.
      license: SPDX names; as the package and, where it says more, the file's own metadata state it.
      author: whose it is.
    """

    package: str
    path: str
    license: str = ""
    author: str = ""


def _plasma(name: str, author: str) -> Photograph:
    path = f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg"
    # metadata.json of each wallpaper says LGPL, the copyright file of the package says GPL.
    return Photograph("plasma-workspace-wallpapers", path, "LGPL-3.0-only (GPL-2.0-or-later by Debian)", author)


def _lomiri(name: str, license: str, author: str, release: str = "16.04") -> Photograph:
    return Photograph(f"lomiri-wallpapers-{release}", f"usr/share/backgrounds/{name}.jpg", license, author)


def _mate(name: str, author: str) -> Photograph:
    path = f"usr/share/backgrounds/mate/nature/{name}.jpg"
    return Photograph("mate-backgrounds", path, "GPL-2.0-or-later", author)


_AITZOL, _PETER = "Aitzol Berasategi", "Peter Nerlich"

PHOTOGRAPHS = (
    _plasma("BytheWater", "Maciej Wiklo"),
    _plasma("ColdRipple", "Risto Saukonpää"),
    _plasma("ColorfulCups", "Dmitri Popov"),
    _plasma("DarkestHour", "Risto Saukonpää"),
    _plasma("EveningGlow", "Ian Hex"),
    _plasma("FallenLeaf", "Martin Klapetek"),
    _plasma("Grey", "Sigi Sagi"),
    _plasma("Kite", "Risto Saukonpää"),
    _plasma("OneStandsOut", "Risto Saukonpää"),
    _plasma("Path", "Risto Saukonpää"),
    _plasma("summer_1am", "Risto Saukonpää"),
    _lomiri("Kleiber_by_Lukas_Baubkus", "CC-BY-SA-3.0", "Lukas Baubkus", "20.04"),
    Photograph("scikit-image", "skimage/data/astronaut.png", "public domain", "NASA"),
    Photograph("scikit-image", "skimage/data/chelsea.png", "CC0-1.0", "Stefan van der Walt"),
    Photograph("scikit-image", "skimage/data/coffee.png", "CC0-1.0", "Rachel Michetti"),
    Photograph("scikit-image", "skimage/data/rocket.jpg", "public domain", "SpaceX"),
    Photograph("scikit-learn", "sklearn/datasets/images/china.jpg", "CC-BY-2.0", "danielbuechele"),
    Photograph("scikit-learn", "sklearn/datasets/images/flower.jpg", "CC-BY-2.0", "vultilion"),
    _lomiri("Bridge_by_Sander_Klootwijk", "CC-BY-SA-4.0", "Sander Klootwijk"),
    _lomiri("Dragonfly_by_Bolly", "CC-BY-SA-4.0", "Bolly"),
    _lomiri("Picture_0B_by_freespace", "CC-BY-4.0", 'Trevor "Freespace"'),
    _lomiri("Picture_1A_by_freespace", "CC-BY-4.0", 'Trevor "Freespace"'),
    _lomiri("Wine_by_Jakkub_Mede", "CC-BY-4.0", "Jakub Mede"),
    _lomiri("aitzgorri_by_Aitzol_Berasategi", "CC-BY-4.0", _AITZOL),
    _lomiri("free_by_Peter_Nerlich", "CC-BY-SA-4.0", _PETER),
    _lomiri("friends_by_Aitzol_Berasategi", "CC-BY-4.0", _AITZOL),
    _lomiri("greentock_by_Peter_Nerlich", "CC-BY-SA-4.0", _PETER),
    _lomiri("life_by_Aitzol_Berasategi", "CC-BY-4.0", _AITZOL),
    _lomiri("picosdeeuropa_by_Aitzol_Berasategi", "CC-BY-4.0", _AITZOL),
    _lomiri("seeding_by_Clements_Engelhardt", "CC0-1.0", "Clemens Engelhardt"),
    _lomiri("sunset_by_Aitzol_Berasategi", "CC-BY-4.0", _AITZOL),
    _mate("Aqua", "Charles Barbin"),
    _mate("Blinds", "Lennart Poettering, Andrea Cimitan"),
    _mate("Dune", "Marco Cogoni, Hylke Bons"),
    _mate("FreshFlower", "Jens Ansorg"),
    _mate("Garden", "Charles Barbin"),
    _mate("GreenMeadow", "Timothy Schellhase, Lapo Calamandrei"),
    _mate("LadyBird", "Charles Barbin"),
    _mate("RainDrops", "blackcombwhistler07"),
    _mate("Storm", "Sergey Nazarov"),
    _mate("TwoWings", "Charles Barbin, Hylke Bons"),
    _mate("Wood", "Jean-François Fortin Tam"),
    _mate("YellowFlower", "Charles Barbin"),
)
