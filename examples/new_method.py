"""A method of one's own is one class: relational distances (RKD-D; Park, Kim, Lu, Cho, CVPR 2019, equations 5 and 6).

In this folder: factor-transfer distill --data digits ... --beta 0 --term new_method:Distances
"""

import torch.nn.functional as F
from torch import Tensor

from factor_transfer.pairs import Pair
from factor_transfer.terms import Reader, StudentOutputs, Term


class Pooled(Reader):
    """The teacher's map, averaged over places; of one size for each image, so it can be cached (--views)."""

    def __init__(self, layer: str, channels: int) -> None:
        super().__init__(layer, size=(1, 1))
        self.shape = (channels, 1, 1)


class Distances(Term):
    """25 x Huber loss of the distances between the images of a batch, as the student and as the teacher sees them."""

    name = "distances"
    label = "relational distances"
    weight = 25.0
    needs = frozenset({"pooled"})

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.teacher = pair.teacher

    def readers(self) -> dict[str, Reader]:
        """What the teacher shall give: `pooled`, (B, C, 1, 1)."""
        return {"pooled": Pooled(self.teacher.layer, self.teacher.shape[0])}

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Compares all pairs of images."""
        ours, theirs = (F.pdist(x.float().flatten(1)) for x in (student.feature.mean((2, 3)), teacher["pooled"]))
        return self.weight * F.smooth_l1_loss(ours / ours.mean(), theirs / theirs.mean())
