from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import torch
from almrr_pipeline.config import BackboneSettings, ModelSettings
from almrr_pipeline.inference.fuse import fuse
from almrr_pipeline.model.almrr import ALMRR
from almrr_pipeline.model.backbone import build_backbone
from almrr_pipeline.model.kernels import decoder_tail, residual_kernels
from almrr_pipeline.model.kernels.scan import numba_kernels as scan
from almrr_pipeline.model.kernels.warm_up import warm_up

kernels = {
    "scan_forward": scan.scan_forward,
    "scan_backward": scan.scan_backward,
    "conv_forward": scan.conv_forward,
    "conv_backward": scan.conv_backward,
    "measure_channels": decoder_tail.measure_channels,
    "sum_channels": decoder_tail.sum_channels,
    "mix": residual_kernels.mix,
    "differentiate": residual_kernels.differentiate,
}
print(sorted(name for name, kernel in kernels.items() if kernel.signatures))
warm_up()
print(sorted(name for name, kernel in kernels.items() if not kernel.signatures))
compiled = {name: len(kernel.signatures) for name, kernel in kernels.items()}

settings = ModelSettings(
    latent=16, dim=16, depth=1, decoder=(8, 8), refinement_width=4,
    refinement_input="projection", refinement_channels=2, residual_channels=2,
)
backbone = build_backbone(BackboneSettings(name="test_resnet"), weights=None)
model = ALMRR(backbone, settings, image_size=(128, 128)).train()
images = torch.rand(2, 3, 128, 128)
for half in (False, True):
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = model.training_forward(images, images.flip(0))
    (output.logits.mean() + output.reconstruction.mean()).backward()
with torch.inference_mode():
    fuse(model.eval())(images)
print(sorted(name for name, kernel in kernels.items() if len(kernel.signatures) != compiled[name]))
"""


def test_warming_up_compiles_every_kernel_that_training_and_predicting_start() -> None:
    """In a process of its own, where no other test has compiled any, and none anew afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["[]", "[]", "[]"]
