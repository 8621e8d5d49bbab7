"""The results of the paper as data, for comparison with measured ones: Ho et al., Cascaded Diffusion Models (2022).

Source [A] is the authors' own material or a verbatim quotation of it. Source [B] is one careful transcription, which
agrees with [A] wherever both give a number. Numbers found in neither are left out. All results are for
class-conditional ImageNet without guidance; FID and Inception Score use 50,000 generated images. The keys of the outer
dicts are resolutions. Numbers are text, to be shown with the paper's digits.
"""

from __future__ import annotations

SOURCE = "Ho et al., Cascaded Diffusion Models for High Fidelity Image Generation, JMLR 23(47), 2022, arXiv 2106.15282"
CDM = "CDM"
N = 50_000  # generated images for FID and Inception Score

# Table 1a [A]. fid_train and fid_val: against the training and the validation set; is: Inception Score over 10 splits.
# A method with a single FID has it in the table's first FID column, against the training set.
TABLE_1A: dict[int, dict[str, dict[str, str]]] = {
    32: {
        CDM: {"fid_train": "1.11", "fid_val": "1.99", "is": "26.01 ± 0.59"},
    },
    64: {
        "BigGAN-deep": {"fid_train": "4.06"},
        "Improved DDPM": {"fid_train": "2.92"},
        "ADM": {"fid_train": "2.07"},
        CDM: {"fid_train": "1.48", "fid_val": "2.48", "is": "67.95 ± 1.97"},
    },
    128: {
        "BigGAN-deep": {"fid_train": "5.7", "is": "124.5"},
        "BigGAN-deep, max IS": {"fid_train": "25", "is": "253"},
        "LOGAN": {"fid_train": "3.36", "is": "148.2"},
        "ADM": {"fid_train": "5.91"},
        CDM: {"fid_train": "3.52", "fid_val": "3.76", "is": "128.80 ± 2.51"},
    },
    256: {
        "BigGAN-deep": {"fid_train": "6.9", "is": "171.4"},
        "BigGAN-deep, max IS": {"fid_train": "27", "is": "317"},
        "VQ-VAE-2": {"fid_train": "31.11"},
        "Improved DDPM": {"fid_train": "12.26"},
        "SR3": {"fid_train": "11.30"},
        "ADM": {"fid_train": "10.94", "is": "100.98"},
        "ADM, upsampling": {"fid_train": "7.49", "is": "127.49"},
        CDM: {"fid_train": "4.88", "fid_val": "4.63", "is": "158.71 ± 2.26"},
    },
}

# Table 1b [A]: classification accuracy scores of a ResNet-50, in per cent.
CLASSIFIER = "ResNet-50"
TABLE_1B: dict[int, dict[str, dict[str, str]]] = {
    128: {
        "real images": {"top1": "68.82", "top5": "88.79"},
        "BigGAN-deep": {"top1": "40.64", "top5": "64.44"},
        "HAM": {"top1": "54.05", "top5": "77.33"},
        CDM: {"top1": "59.84", "top5": "81.79"},
    },
    256: {
        "real images": {"top1": "73.09", "top5": "91.47"},
        "BigGAN-deep": {"top1": "42.65", "top5": "65.92"},
        "VQ-VAE-2": {"top1": "54.83", "top5": "77.59"},
        CDM: {"top1": "63.02", "top5": "84.06"},
    },
}

# Ablations [B]: FID against the training set. For the search over s from 32 to 64, the best s itself is not known.
ABLATIONS: dict[int, dict[str, dict[str, str]]] = {
    64: {
        "the small ablation, 16 to 64 in one step": {
            "no cascade": "2.35",
            "cascade, s = 0": "6.02",
            "cascade, s = 101": "3.41",
            "cascade, s = 1001": "2.13",
        },
        "the cascade 32 to 64, amortised s": {
            "no augmentation": "1.71",
            "the best s": "1.48",
        },
    },
    256: {
        "the stage 64 to 256, one change after another": {
            "blur, σ from 0.4 to 0.6": "6.18",
            "and class conditioning": "5.75",
            "and a batch of 1024 instead of 256": "5.00",
            "and horizontal flips": "4.88",
        },
    },
}
