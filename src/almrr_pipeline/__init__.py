"""ALMRR: find and outline defects on textured surfaces after training on defect-free images alone."""
