"""Fast implementations of parts of the model, for speed alone.

Each has a plain form that tests compare it with: the selective scan `scan.reference`, the decoder's
end `model.mfrm.Decoder`, resizing with pooling `model.regional_features.regional_features`, and the
composed embedding the two convolutions of `model.mfrm.MFRM`.
"""
