"""Errors: each says what was found, where, and what to do."""


class AographError(Exception):
    """The base of all errors that aograph raises on purpose."""


class CaptureError(AographError):
    """The model could not be captured as one graph."""


class InputError(AographError):
    """A call, an option or a folder that does not fit."""


class RecipeError(AographError):
    """A recipe that cannot be read, or that matches nothing where it should."""


class WeightError(AographError):
    """A weight that cannot be packed (NaN, inf), or is gone."""


class CompileError(AographError):
    """The rewritten graph could not be compiled on this machine."""


class PassError(AographError):
    """A pass failed, or left a graph that the verifier refuses; the message names a reproducer folder."""


class ArtifactError(AographError):
    """A `.pt2` file that is damaged, is no artifact, or does not fit this machine."""
