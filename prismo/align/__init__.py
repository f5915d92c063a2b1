"""Alignment of a VLA's vision tokens with a frozen teacher (Spatial Forcing), for any VLA.

`SpatialForcing` is the class to use; `load_teacher` builds its teacher and `AlignRecipe` holds its settings.
"""

from prismo.align.recipe import AlignRecipe
from prismo.align.spatial_forcing import AlignProjector, SpatialForcing
from prismo.align.teachers import TEACHERS, Teacher, TeacherKind, TeacherSizes, load_teacher, teacher_sizes
from prismo.align.tokens import LayerTap, vision_tokens
from prismo.align.vggt import VGGTAggregator, VGGTConfig, load_vggt

__all__ = [
    "TEACHERS",
    "AlignProjector",
    "AlignRecipe",
    "LayerTap",
    "SpatialForcing",
    "Teacher",
    "TeacherKind",
    "TeacherSizes",
    "VGGTAggregator",
    "VGGTConfig",
    "load_teacher",
    "load_vggt",
    "teacher_sizes",
    "vision_tokens",
]
