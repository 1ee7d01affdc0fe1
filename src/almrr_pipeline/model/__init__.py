"""Parts of the model: backbone, regional features, MFRM, FRM, and the selective scan they rest on."""
