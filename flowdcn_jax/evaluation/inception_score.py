"""The Inception score (Salimans et al., arXiv 1606.03498), and its splits by protocol."""

import numpy as np
from scipy.special import log_softmax


def adm_splits(count: int) -> np.ndarray:
    """Chunks of 5000 images in order, as in ADM's evaluator: the split of each, int [count]."""
    return np.arange(count) // 5000


def torch_fidelity_splits(count: int) -> np.ndarray:
    """Ten splits of images in an order drawn with seed 2020, as in torch-fidelity 0.4.0."""
    ends = np.arange(1, 11) * count // 10
    order = np.random.RandomState(2020).permutation(count)
    splits = np.empty(count, int)
    splits[order] = np.searchsorted(ends, np.arange(count), side="right")
    return np.unique(splits, return_inverse=True)[1]  # of fewer than ten images some are empty


# By protocol.  Once features are there, protocols differ in this alone.
SPLITS = {"adm": adm_splits, "torch_fidelity": torch_fidelity_splits}


class InceptionScore:
    """Sums over class probabilities, streamed in float64, for one score a split."""

    def __init__(self, splits: np.ndarray):
        """`splits`: of each image the number of its split, int [N]; none is empty."""
        self._splits = splits
        self._position = 0
        self._counts = np.bincount(splits)
        self._probabilities: np.ndarray | float = 0.0  # sums of p, [splits,classes]
        self._negative_entropies = np.zeros(len(self._counts))  # sums of p log p

    def add(self, logits: np.ndarray) -> None:
        """Counts the next images' logits [n,classes]."""
        logs = log_softmax(logits.astype(np.float64), axis=1)
        probabilities = np.exp(logs)
        splits = self._splits[self._position : self._position + len(logits)]
        chosen = np.arange(len(self._counts))[:, None] == splits  # [splits,n]
        self._probabilities += chosen @ probabilities
        self._negative_entropies += chosen @ (probabilities * logs).sum(axis=1)
        self._position += len(logits)

    def scores(self) -> np.ndarray:
        """exp(mean KL(p(y|x) || p(y))) of each split; all images must have been counted."""
        marginals = self._probabilities / self._counts[:, None]
        logs = np.log(marginals, out=np.zeros_like(marginals), where=marginals > 0)
        entropies = (marginals * logs).sum(axis=1)
        return np.exp(self._negative_entropies / self._counts - entropies)
