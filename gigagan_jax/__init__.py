"""GigaGAN in JAX: text-to-image GANs trained on TPU pods and GPU clusters.

Paper: Kang et al., "Scaling up GANs for Text-to-Image Synthesis", CVPR 2023 (arXiv:2303.05511).
"""

__version__ = "0.1.0"
