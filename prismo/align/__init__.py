"""Alignment of a VLA's vision tokens with a frozen teacher (Spatial Forcing), for any VLA.

`SpatialForcing` is the class to use; `load_teacher` builds its teacher and `AlignRecipe` holds its settings.
"""

from prismo.align.recipe import AlignRecipe
from prismo.align.spatial_forcing import AlignProjector, SpatialForcing
from prismo.align.teachers import TEACHERS, Teacher, TeacherOutline, load_teacher, outline_teacher
from prismo.align.tokens import LayerTap, vision_tokens
from prismo.align.vggt import VGGTAggregator, VGGTConfig, load_vggt

__all__ = [
    "TEACHERS",
    "AlignProjector",
    "AlignRecipe",
    "LayerTap",
    "SpatialForcing",
    "Teacher",
    "TeacherOutline",
    "VGGTAggregator",
    "VGGTConfig",
    "load_teacher",
    "load_vggt",
    "outline_teacher",
    "vision_tokens",
]
