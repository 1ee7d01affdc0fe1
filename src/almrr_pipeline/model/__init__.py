"""The network of the paper: backbone, regional features, MFRM, FRM."""
