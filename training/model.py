"""The model as it is trained: the same function, of which the gradient costs less."""

from aliked.configs import Form
from aliked.model import ALIKED


class TrainableALIKED(ALIKED):
    """An `ALIKED` that upsamples by matrix products, as files of symbolic sizes do.

    The gradient of PyTorch's interpolation adds up atomically, which took half of every step; that
    of a product is a product.
    """

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.form = Form(dynamic=True)
