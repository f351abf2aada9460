"""From images to the numbers that figures are made of: features, means, covariances, scores."""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from flowdcn_jax.errors import UserError
from flowdcn_jax.evaluation.gaussian import Gaussian, Moments
from flowdcn_jax.evaluation.image_sets import ImageSet
from flowdcn_jax.evaluation.inception_score import SPLITS, InceptionScore
from flowdcn_jax.evaluation.settings import EvaluationError

MAX_FEATURES = 50_000  # images whose features are kept: 410 MB of Inception's

FEATURES, SPATIAL, LOGITS = "features", "spatial", "logits"  # outputs of networks
_IN_FLIGHT = 2  # batches: one is computed while another is copied
_MESSAGE_BYTES = 512

Outputs = dict[str, np.ndarray]


class Features(Protocol):
    """A feature network, as `load_features` gives it.

    Attributes:
        description: a named tuple of the names of `network` and `protocol`, the `preprocessing`,
            `precision`, `weights_sha256` and more, of JSON's types.
        num_features: F.
        batch_size: images that suit the devices; the same in all processes.
    """

    description: Any
    num_features: int
    batch_size: int

    def __call__(self, images: np.ndarray) -> Outputs:
        """Of uint8 images [n,H,W,3] float32 `features` [n,F]; of Inception `spatial`, `logits` too.

        Is called by two threads at once.
        """
        ...


def describe(features: Features) -> dict[str, Any]:
    """What features are, for comparison and for JSON."""
    return features.description._asdict() | {"num_features": features.num_features}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The numbers of one set of images.

    Attributes:
        count: images behind the Gaussians; None: not known.
        gaussians: of `features`, and of `spatial` if the network has it.
        features: float32 [K,F], of all images or of some that lie evenly among them; None: not
            kept.
        scores: the Inception score of each split; None: not known.
        network: `describe(features)`; None: not known.
        images: `ImageSet.describe()`, or what else is known of them.
        unread: images of which only `features` and `scores` are wanted, and not there yet.
    """

    count: int | None
    gaussians: dict[str, Gaussian]
    features: np.ndarray | None
    scores: np.ndarray | None
    network: dict[str, Any] | None
    images: dict[str, Any]
    unread: ImageSet | None = None


def collect(
    images: ImageSet,
    features: Features,
    *,
    num_features: int = MAX_FEATURES,
    title: str | None = "images",
) -> Statistics:
    """Runs a network over images, on all local devices of all processes, in one pass.

    Every process gets the features of all, and so the same statistics.  Beside a few batches memory
    holds two float64 matrices of an output's covariance and the features that are kept.

    Args:
        images: at least two.
        features: the network; in each process one for its own devices.
        num_features: images whose features are kept, at most.
        title: of the progress bar; None: there is none.

    Raises:
        EvaluationError: fewer than two images, images that cannot be read, or features that are not
            finite; in all processes.
    """
    network = describe(features)
    if images.count < 2:
        raise EvaluationError(f"{images.source} holds {images.count} image; expected at least 2")
    num_kept = min(num_features, images.count)
    kept = np.arange(num_kept) * images.count // num_kept
    kept_rows = np.empty((num_kept, features.num_features), np.float32)
    score = InceptionScore(SPLITS[network["protocol"]](images.count))
    moments: dict[str, Moments] = {}
    start = 0
    options = dict(unit="img", dynamic_ncols=True, disable=not title or jax.process_index() > 0)
    with tqdm(total=images.count, desc=title, **options) as progress:
        for outputs in _run(images, features):
            _check_finite(outputs, images, start)
            stop = start + len(outputs[FEATURES])
            for name, rows in outputs.items():
                if name == LOGITS:
                    score.add(rows)
                    continue
                if name not in moments:
                    moments[name] = Moments(rows.shape[1])
                moments[name].add(rows)
            first, last = np.searchsorted(kept, (start, stop))
            kept_rows[first:last] = outputs[FEATURES][kept[first:last] - start]
            progress.update(stop - start)
            start = stop
    return Statistics(
        count=images.count,
        gaussians={name: each.gaussian() for name, each in moments.items()},
        features=kept_rows,
        scores=score.scores() if LOGITS in outputs else None,
        network=network,
        images=images.describe(),
    )


def _run(images: ImageSet, features: Features) -> Iterator[Outputs]:
    """The outputs for all images in order, the same in all processes.

    Raises:
        EvaluationError: something is wrong in one of the processes.
    """
    processes, number = jax.process_count(), jax.process_index()
    shares = []  # of each step a range of images a process
    for start in range(0, images.count, features.batch_size * processes):
        stop = min(start + features.batch_size * processes, images.count)
        edges = [start + (stop - start) * each // processes for each in range(processes + 1)]
        shares.append([range(*pair) for pair in itertools.pairwise(edges)])
    # A process without images of its own computes one that is not counted.
    mine = [each[number] or range(each[0].start, each[0].start + 1) for each in shares]
    local = _run_here(images, features, mine)
    if processes == 1:
        yield from local
        return
    for each in shares:
        outputs, error = {}, ""
        try:
            outputs = next(local)
        except UserError as caught:
            error = str(caught)
        _agree(error)
        gathered = {}
        for name, rows in outputs.items():
            filled = np.zeros((features.batch_size, *rows.shape[1:]), np.float32)
            filled[: len(rows)] = rows
            parts = zip(multihost_utils.process_allgather(filled), each, strict=True)
            gathered[name] = np.concatenate([part[: len(share)] for part, share in parts])
        yield gathered


def _run_here(images: ImageSet, features: Features, ranges: list[range]) -> Iterator[Outputs]:
    """The outputs of this process's images, a range at a time.

    Threads read the next range and keep the devices busy, while the caller counts the last.
    """
    running: collections.deque[Future[Outputs]] = collections.deque()
    with (
        contextlib.closing(images.read(ranges)) as stream,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(_IN_FLIGHT) as runner,
    ):
        reading = reader.submit(next, stream, None)
        while (batch := reading.result()) is not None:
            reading = reader.submit(next, stream, None)
            running.append(runner.submit(features, batch))
            if len(running) > _IN_FLIGHT:
                yield _wanted(running.popleft().result())
        yield from (_wanted(each.result()) for each in running)


def _wanted(outputs: Outputs) -> Outputs:
    return {name: outputs[name] for name in (FEATURES, SPATIAL, LOGITS) if name in outputs}


def _agree(error: str) -> None:
    """Raises in all processes what is wrong in one; "" where nothing is."""
    text = error.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    texts = multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
    messages = [text.tobytes().rstrip(b"\0").decode(errors="ignore") for text in texts]
    first = next(filter(None, messages), None)
    if first is not None:
        raise EvaluationError(first)


def _check_finite(outputs: Outputs, images: ImageSet, start: int) -> None:
    for name, rows in outputs.items():
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if bad.size:
            raise EvaluationError(
                f"{name} of image {start + bad[0]} of {images.source} are not finite; expected "
                "numbers"
            )
