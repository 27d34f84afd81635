"""Self-supervised pretraining of Vision-LSTM. Importing the package registers its models with timm."""

from selfvil import models as models
from selfvil.version import __version__ as __version__
