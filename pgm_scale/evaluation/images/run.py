"""`pgm-scale eval-images`: samples of a run, or reconstructions of a tokenizer, against a reference."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pgm_scale.data.manifest import ImageContent
from pgm_scale.errors import UserError
from pgm_scale.evaluation.images.chunks import ChunkFolder, Columns
from pgm_scale.evaluation.images.classifier import LightClassifier, require_scikit_learn
from pgm_scale.evaluation.images.features import FeatureKind, ImageFeatures, describe, open_features
from pgm_scale.evaluation.images.frechet import frechet_distance
from pgm_scale.evaluation.images.generation import ImageSampler, LabelOrder, Precision
from pgm_scale.evaluation.images.inception_score import SPLITS, inception_score, softmax
from pgm_scale.evaluation.images.moments import Moments, MomentsAccumulator
from pgm_scale.evaluation.images.sources import (
    FolderImages,
    ImageSource,
    ReconstructedImages,
    SampledImages,
    SplitImages,
    open_images,
)
from pgm_scale.evaluation.images.statistics import read_statistics, write_statistics
from pgm_scale.evaluation.images.work import chosen_step, only_process
from pgm_scale.files import sha256_file
from pgm_scale.parallel.launch import Launch
from pgm_scale.run_folder import RunFolder, RunIdentity
from pgm_scale.vq_tokenizer import VQTokenizer

CHUNK_IMAGES = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """What both evaluations share.

    Attributes:
        reference: a split of pixels or codes, a folder of images, or a file of statistics.
        work: a folder for chunks, which a run that goes on takes up; all ranks see the same one.
        save_reference: an .npz to write the reference's statistics to.
        timeout_s: how long rank 0 waits for the next chunk of another rank, and they for its choice of a step.
    """

    reference: str
    work: Path
    features: FeatureKind = "inception"
    inception_path: str | None = None
    save_reference: str | None = None
    batch_images: int = 32
    timeout_s: float = 1800.0
    chunk_images: int = CHUNK_IMAGES

    @property
    def cache_folder(self) -> Path:
        """For what is fetched of remote splits."""
        return self.work / "remote"


@dataclass(frozen=True)
class SamplingRequest:
    """What is sampled: `settings` are fields of SamplerConfig that replace the run's own."""

    count: int = 50_000
    settings: dict[str, Any] = field(default_factory=dict)
    labels: LabelOrder | None = None
    classifier: str | None = None  # a labelled split for it, with light features; None: the reference
    vq_path: str | None = None  # None: the run's own copy
    seed: int = 1
    precision: Precision = "fp32"
    weights: Literal["ema", "weight"] = "ema"
    step: int | None = None  # None: as chosen in the work folder before, else the newest good one


def evaluate_images(
    run_folder: str, request: SamplingRequest, comparison: Comparison, launch: Launch
) -> dict[str, Any] | None:
    """Sample, decode and compare `request.count` images; the result on rank 0, None on the others.

    No image is left out: the reference drops its last partial batch (FACTS 7).

    Raises:
        UserError: bad input; nothing is sampled before all of it was checked.
        HungRankError: another rank's chunks do not come.
    """
    if request.count < SPLITS:
        raise UserError(f"--count {request.count}: the scores need at least {SPLITS} images; ask for more")
    device = _device(launch)
    desk = _Desk(comparison, launch, open_features(comparison.features, comparison.inception_path, device))
    run = RunFolder(run_folder).identity()
    if run.images is None or run.images.tokens != "codes":
        raise UserError(
            f"{run_folder} is no run on codes of images; give one of objective image_pgm or maskgit"
        )
    vq = VQTokenizer.load(request.vq_path or run_folder, device)
    if vq.sha256 != run.tokenizer_sha256:
        raise UserError(
            f"{run_folder} was trained on codes of another VQ tokenizer than {request.vq_path or 'its own copy'}; "
            "give that one with --vq"
        )
    reference = _open_reference(desk, vq)
    if reference.source is not None:
        _check_shape(reference.source.shape_HWC, run.images, reference.name)
    labelled = _labelled(reference, request, run)
    lessons = _lessons(request, comparison, labelled, vq, run)
    with only_process(comparison.work, launch):
        step = request.step or chosen_step(run_folder, comparison.work, launch, comparison.timeout_s)
        sampler = ImageSampler(
            run_folder,
            step,
            request.settings,
            request.seed,
            comparison.batch_images,
            request.weights,
            request.precision,
            device,
        )
        labels = sampler.labels(request.labels, labelled)
        identity = sampler.identity(labels)
        codes = ChunkFolder(comparison.work, "codes", identity, request.count, comparison.chunk_images)
        codes.fill(lambda numbers: sampler.codes(numbers, labels), launch, "sampling")
        sampled = SampledImages(codes, identity | {"vq": vq.sha256}, vq, comparison.batch_images)
        generated = desk.extract(sampled, "features of samples")
        known = desk.extract(reference.source, "features of the reference") if reference.source else None
        learned = known if lessons is reference.source else None
        if lessons is not None and learned is None:
            learned = desk.extract(lessons, "features for the classifier")
        if launch.rank != 0:
            return None
        desk.wait_for(generated, learned, known)
        moments = reference.moments(desk, known)
        return {
            "run": run_folder,
            **identity,
            "vq_sha256": vq.sha256,
            "count": request.count,
            **desk.distance(generated, moments),
            **_scores(desk, generated, learned, known if labelled is not None else None),
            **reference.described(moments),
            "images_per_second_per_process": request.count / float(generated.column("seconds").sum()),
            "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        }


def evaluate_reconstruction(vq_path: str, comparison: Comparison, launch: Launch) -> dict[str, Any] | None:
    """Encode and decode the reference's images and compare them with themselves; the result on rank 0.

    Raises:
        UserError: bad input, or a reference without pixels.
        HungRankError: another rank's chunks do not come.
    """
    device = _device(launch)
    desk = _Desk(comparison, launch, open_features(comparison.features, comparison.inception_path, device))
    vq = VQTokenizer.load(vq_path, device)
    reference = _open_reference(desk, None)
    if reference.source is None:
        raise UserError(f"{reference.name} has no pixels to reconstruct; give a split or a folder of images")
    with only_process(comparison.work, launch):
        rebuilt = desk.extract(
            ReconstructedImages(reference.source, vq, comparison.batch_images), "features of reconstructions"
        )
        known = desk.extract(reference.source, "features of the reference")
        if launch.rank != 0:
            return None
        desk.wait_for(rebuilt, known)
        moments = reference.moments(desk, known)
    squared_B = rebuilt.column("squared_error")
    with np.errstate(divide="ignore"):
        decibels_B = -10.0 * np.log10(squared_B)
    return {
        "vq": vq_path,
        "vq_sha256": vq.sha256,
        "count": len(squared_B),
        **desk.distance(rebuilt, moments),
        "mean_squared_error": float(squared_B.mean()),  # of pixels in [0, 1]
        "psnr_db": float(decibels_B.mean()),
        **reference.described(moments),
    }


@dataclass(frozen=True)
class _Desk:
    """The work folder, the extractor and this rank's place among the others."""

    comparison: Comparison
    launch: Launch
    features: ImageFeatures

    def extract(self, source: ImageSource, label: str) -> ChunkFolder:
        """This rank's share of the features of all images of the source."""
        identity = {"images": source.identity, "features": describe(self.features)}
        folder = ChunkFolder(
            self.comparison.work, "features", identity, source.count, self.comparison.chunk_images
        )

        def columns(numbers: range) -> Columns:
            images = source.read(numbers)
            rows = self.features(images.pixels_BHWC)
            logits = {} if rows.logits_BK is None else {"logits": rows.logits_BK}
            return images.columns | {"features": rows.features_BF} | logits

        folder.fill(columns, self.launch, label)
        return folder

    def wait_for(self, *folders: ChunkFolder | None) -> None:
        for folder in folders:
            if folder is not None:
                folder.wait(self.launch, self.comparison.timeout_s)

    def moments(self, folder: ChunkFolder) -> Moments:
        accumulator = MomentsAccumulator(self.features.dimension)
        for columns in folder:
            accumulator.add(columns["features"])
        moments = accumulator.result()
        if moments.count is not None and moments.count <= self.features.dimension:
            _log.warning(
                "%d images are few for %d features: the distance is biased upwards; compare equal counts only",
                moments.count,
                self.features.dimension,
            )
        return moments

    def distance(self, folder: ChunkFolder, reference: Moments) -> dict[str, Any]:
        value = frechet_distance(self.moments(folder), reference)
        return {self.features.distance_name: value, "features": describe(self.features)}


@dataclass(frozen=True)
class _Reference:
    """Images, or only the statistics of their features."""

    name: str
    sha256: str
    source: SplitImages | FolderImages | None
    statistics: Moments | None

    def moments(self, desk: _Desk, known: ChunkFolder | None) -> Moments:
        """Of the features in `known`, or as they were read; saved if that was asked for."""
        if known is None:
            assert self.statistics is not None
            return self.statistics
        moments = desk.moments(known)
        if desk.comparison.save_reference:
            source = f"{self.name} {self.sha256}"
            write_statistics(Path(desk.comparison.save_reference), moments, desk.features, source)
        return moments

    def described(self, moments: Moments) -> dict[str, Any]:
        content = "statistics" if self.source is None else self.source.content
        return {
            "reference": {
                "name": self.name,
                "content": content,  # a distance to codes is one to reconstructions, not the usual FID
                "sha256": self.sha256,
                "count": moments.count,
            }
        }


def _check_shape(shape_HWC: tuple[int, int, int], run: ImageContent, where: str) -> None:
    """Refuse a reference of another size or colour, whose distance would mean nothing."""
    expected = (run.side_pixels, run.side_pixels, run.channels)
    if shape_HWC != expected:
        raise UserError(
            f"{where}: images of {' x '.join(map(str, shape_HWC))} values, those of the run have "
            f"{' x '.join(map(str, expected))}; prepare the reference with the same --size and --channels"
        )


def _open_reference(desk: _Desk, vq: VQTokenizer | None) -> _Reference:
    name = desk.comparison.reference
    if Path(name).is_file():
        if desk.comparison.save_reference:
            raise UserError(f"--save-reference: {name} already is a file of statistics; leave the option out")
        statistics = read_statistics(Path(name), desk.features)
        return _Reference(name, sha256_file(Path(name)), None, statistics)
    source = open_images(name, vq, desk.comparison.cache_folder)
    return _Reference(name, source.sha256, source, None)


def _labelled(reference: _Reference, request: SamplingRequest, run: RunIdentity) -> SplitImages | None:
    """The reference, if it has labels that mean what the run's mean."""
    if not isinstance(reference.source, SplitImages):
        return None
    problem = _class_difference(reference.source, run)
    if problem is None:
        return reference.source
    if request.labels != "balanced":
        raise UserError(f"--reference {reference.name}: {problem}; give its own data, or --labels balanced")
    return None


def _class_difference(images: SplitImages, run: RunIdentity) -> str | None:
    """Why the labels of the split are not the run's. Names that are only numbers say nothing but their count."""
    theirs, ours = images.class_names, run.images.class_names if run.images else ()
    if len(theirs) != len(ours):
        return f"it has {len(theirs)} classes, the run {len(ours)}"
    numbers = tuple(map(str, range(len(ours))))
    if numbers in (theirs, ours) or theirs == ours:
        return None
    number = next(n for n in range(len(ours)) if theirs[n] != ours[n])
    return f"its class {number} is {theirs[number]!r}, the run's {ours[number]!r}"


def _lessons(
    request: SamplingRequest,
    comparison: Comparison,
    labelled: SplitImages | None,
    vq: VQTokenizer,
    run: RunIdentity,
) -> SplitImages | None:
    """The labelled images that the classifier of light features learns from, if there are any.

    Raises:
        UserError: it could not learn: other classes, one class only, or scikit-learn is not installed.
    """
    if comparison.features != "light":
        if request.classifier is not None:
            raise UserError("--classifier goes with --features light; inception features have their own")
        return None
    lessons = labelled
    if request.classifier is not None:
        images = open_images(request.classifier, vq, comparison.cache_folder)
        if not isinstance(images, SplitImages):
            raise UserError(
                f"--classifier {request.classifier}: the images have no labels; give a split folder"
            )
        if problem := _class_difference(images, run):
            raise UserError(f"--classifier {request.classifier}: {problem}; give a split of the run's data")
        lessons = images
    if lessons is not None:
        require_scikit_learn()
        if not lessons.has_two_classes():
            raise UserError(
                f"{lessons.name}: all of one class, from which no classifier learns; "
                "give another split with --classifier"
            )
    return lessons


def _scores(
    desk: _Desk, generated: ChunkFolder, learned: ChunkFolder | None, known: ChunkFolder | None
) -> dict[str, Any]:
    """The Inception score; with light features that of a classifier of them, and its accuracy, if it can be had."""
    if learned is None:
        if desk.comparison.features == "light":
            return {}
        return _score("inception_score", softmax(generated.column("logits")))
    classifier = LightClassifier(learned.column("features"), learned.column("labels"))
    features_BF = generated.column("features")
    found = _score("classifier_score", classifier.probabilities(features_BF))
    found["classifier_accuracy"] = classifier.accuracy(features_BF, generated.column("labels"))
    if known is not None and known.path != learned.path:
        # What real images reach that the classifier has not seen.
        found["classifier_accuracy_of_reference"] = classifier.accuracy(
            known.column("features"), known.column("labels")
        )
    return found


def _score(name: str, probabilities_BK: np.ndarray) -> dict[str, Any]:
    score = inception_score(probabilities_BK)
    return {name: score.mean, f"{name}_standard_deviation": score.standard_deviation}


def _device(launch: Launch) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
