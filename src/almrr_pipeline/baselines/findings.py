"""Warnings that a comparison with the baselines gives reason for."""

from __future__ import annotations

from collections.abc import Mapping

LEAK_AUROC = 0.9
"""Image AUROC of the nearest image from which a split is suspect: on MT-defect it is 0.98 where
tiles are on both sides of the split, and 0.74 where they are not."""
LEAK_TWINS = 0.5
"""Fraction of normal test images with a training twin; there 0.97, and 0 without the leak."""
MARGIN = 0.02
"""Lead of a metric that counts; the seeds of one training differ by 0.01 to 0.04."""
COMPARED = {"image_auroc": "image AUROC", "pixel_ap": "pixel AP", "aupro_30": "AUPRO 30 %"}


def list_warnings(categories: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Sentences on leaking splits, and on categories that the memory bank is better at.

    `categories` are metrics by category, those of the baselines with `memory_bank_` and
    `nearest_image_` in front of their names.
    """
    found = []
    for category, metrics in categories.items():
        auroc = metrics.get("nearest_image_image_auroc")
        twins = metrics.get("nearest_image_normal_with_twin")
        if auroc is not None and twins is not None and auroc >= LEAK_AUROC and twins >= LEAK_TWINS:
            found.append(
                f"{category}: the split leaks. The nearest training image, which sees no small "
                f"defect, reaches an image AUROC of {auroc:.3f}: {100 * twins:.0f} % of the normal "
                "test images show what a training image shows. Split by specimen; do not trust "
                "image-level metrics of this split."
            )
        if ahead := _leads(metrics):
            advice = " For this data it is the better choice." if len(ahead) > 1 else ""
            found.append(
                f"{category}: the memory bank is ahead of ALMRR in {' and '.join(ahead)}.{advice}"
            )
    return found


def _leads(metrics: Mapping[str, float | None]) -> list[str]:
    """Metrics in which the memory bank leads, each with both values."""
    leads = []
    for name, text in COMPARED.items():
        own, bank = metrics.get(name), metrics.get(f"memory_bank_{name}")
        if own is not None and bank is not None and bank - own > MARGIN:
            leads.append(f"{text} ({bank:.3f} against {own:.3f})")
    return leads
