import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from defuse.errors import InvalidInput, NotFound
from defuse.v1 import annotation_pb2, model_pb2, region_pb2, release_pb2, run_pb2
from google.protobuf import json_format

from services.gateway.records.idempotency import Claim, claimed
from services.gateway.regions.regions import Regions
from services.storage import keys
from services.storage.artifacts import ArtifactStore

RUN = run_pb2.Run(name="runs/first", config={"model": "models/tiny"})
R1, R2 = "runs/first/regions/r1", "runs/first/regions/r2"


@pytest.fixture
def regions(store: ArtifactStore) -> Regions:
    """Leave a run with two regions, of a model with two classes."""
    store.write_message("models/tiny/model.pb", model_pb2.Model(name="models/tiny", classes=["ant", "bee"]))
    store.write_message("models/tiny/releases/1.pb", release_pb2.Release(model="models/tiny", version=1))
    store.write_message(keys.run(RUN.name), RUN)
    found = [region_pb2.Region(name=name, true_label="ant") for name in (R1, R2)]
    store.write_message(keys.distillation(RUN.name), region_pb2.Distillation(run=RUN.name, regions=found))
    return Regions(store)


def verdict(kind: str, region: str = R1, **more: Any) -> annotation_pb2.Annotation:
    return annotation_pb2.Annotation(
        region=region,
        verdict=annotation_pb2.Annotation.Verdict.Value(f"VERDICT_{kind}"),
        **({"annotator": "ada"} | more),
    )


def test_a_region_nobody_annotated(regions: Regions) -> None:
    """Without a verdict a region has no annotation, and nothing is labelled."""
    assert not regions.get(R1).HasField("annotation")
    assert regions.labelled(RUN) == []


def test_an_annotation_is_kept(regions: Regions) -> None:
    """A verdict comes back with its region, with who said it and when, and leaves other regions alone."""
    answer = regions.annotate(verdict("LABEL", label="bee"))
    assert answer == regions.get(R1) == regions.distillation(RUN).regions[0]
    assert (answer.true_label, answer.annotation.label, answer.annotation.annotator) == ("ant", "bee", "ada")
    assert answer.annotation.create_time.seconds > 0
    assert not regions.get(R2).HasField("annotation")


def test_the_latest_verdict_counts(regions: Regions, store: ArtifactStore) -> None:
    """Every verdict is kept as an object of its own; the last one is what is shown and trained with."""
    for kind, label in (("LABEL", "bee"), ("UNSURE", ""), ("LABEL", "ant")):
        regions.annotate(verdict(kind, label=label))
    assert regions.get(R1).annotation.label == "ant"
    assert len(store.keys(keys.annotations(R1))) == 3
    regions.annotate(verdict("INVALID"))
    assert regions.labelled(RUN) == []


def test_a_verdict_that_is_sent_again(regions: Regions, store: ArtifactStore) -> None:
    """The same request stores it once, so that it does not come before what was said in between."""
    token = claimed.set(Claim(request_id="one", holder="this"))
    regions.annotate(verdict("LABEL", label="bee"))
    claimed.set(Claim(request_id="two", holder="this"))
    regions.annotate(verdict("LABEL", label="ant"))
    claimed.set(Claim(request_id="one", holder="another"))
    assert regions.annotate(verdict("LABEL", label="bee")).annotation.label == "ant"
    assert len(store.keys(keys.annotations(R1))) == 2
    claimed.reset(token)


def test_only_labels_are_trained_with(regions: Regions) -> None:
    """Regions whose verdict is no label are left out of correction."""
    regions.annotate(verdict("MIXED"))
    regions.annotate(verdict("LABEL", region=R2, label="bee"))
    assert [(region.region, region.label) for region in regions.labelled(RUN)] == [(R2, "bee")]


@pytest.fixture
def split(regions: Regions, store: ArtifactStore) -> Regions:
    """Leave r1 split into two parts, the first of them into two again; scores mix them with r2."""
    for whole, scores in ((R1, (0.5, 0.1)), (f"{R1}-1", (0.4, 0.05))):
        parts = [
            region_pb2.Region(name=f"{whole}-{number}", true_label="ant", score=score)
            for number, score in enumerate(scores, start=1)
        ]
        store.write_message(keys.region_parts(whole), region_pb2.Distillation(run=RUN.name, regions=parts))
    found = [region_pb2.Region(name=name, true_label="ant", score=score) for name, score in ((R1, 0.6), (R2, 0.3))]
    store.write_message(keys.distillation(RUN.name), region_pb2.Distillation(run=RUN.name, regions=found))
    return regions


def listed(regions: Regions) -> list[str]:
    return [region.name.rsplit("/", 1)[-1] for region in regions.distillation(RUN).regions]


def test_parts_are_listed_while_their_region_is_mixed(split: Regions) -> None:
    """Parts stand among all regions by their scores while the latest verdict on the whole is mixed, at any depth."""
    assert listed(split) == ["r1", "r2"]
    split.annotate(verdict("MIXED"))
    assert listed(split) == ["r1", "r1-1", "r2", "r1-2"]
    split.annotate(verdict("MIXED", region=f"{R1}-1"))
    assert listed(split) == ["r1", "r1-1", "r1-1-1", "r2", "r1-2", "r1-1-2"]
    split.annotate(verdict("LABEL", label="ant"))
    assert listed(split) == ["r1", "r2"]


def test_labelled_parts_are_trained_with_in_place_of_the_whole(split: Regions) -> None:
    """A labelled part counts while its whole is mixed; a verdict on the whole that is taken back takes it back."""
    split.annotate(verdict("LABEL", region=f"{R1}-2", label="bee"))
    assert split.labelled(RUN) == []
    split.annotate(verdict("MIXED"))
    assert [(region.region, region.label) for region in split.labelled(RUN)] == [(f"{R1}-2", "bee")]
    split.annotate(verdict("LABEL", label="ant"))
    assert [(region.region, region.label) for region in split.labelled(RUN)] == [(R1, "ant")]


def test_a_part_is_a_region(split: Regions) -> None:
    """A part is found by its name, and its parts come with what was said of them."""
    split.annotate(verdict("UNSURE", region=f"{R1}-2"))
    assert split.get(f"{R1}-2").annotation.annotator == "ada"
    assert [part.HasField("annotation") for part in split.parts(R1)] == [False, True]
    assert split.parts(R2) == []


def test_what_verdicts_say_of_validity(split: Regions) -> None:
    """Invalid regions and those labelled as their sources are, parts too; other labels and verdicts say nothing."""
    split.annotate(verdict("MIXED"))
    split.annotate(verdict("LABEL", region=f"{R1}-1", label="ant"))
    split.annotate(verdict("INVALID", region=f"{R1}-2"))
    split.annotate(verdict("LABEL", region=R2, label="bee"))
    judged = split.judged(RUN)
    assert (judged.invalid, judged.valid) == ([f"{R1}-2"], [f"{R1}-1"])
    split.annotate(verdict("UNSURE", region=f"{R1}-1"))
    assert split.judged(RUN).valid == []


@pytest.mark.parametrize("label", ["", "cat", "Bee"])
def test_a_label_outside_the_classes(label: str, regions: Regions, store: ArtifactStore) -> None:
    """A label that the model does not have is refused with the ones that it has, and not stored."""
    with pytest.raises(InvalidInput, match="ant, bee") as caught:
        regions.annotate(verdict("LABEL", label=label))
    assert (caught.value.reason, caught.value.field) == ("LABELS_OUTSIDE_CLASSES", "annotation.label")
    assert store.keys(keys.annotations(R1)) == []


def test_a_missing_verdict(regions: Regions) -> None:
    """An annotation without a verdict is refused."""
    with pytest.raises(InvalidInput, match="verdict"):
        regions.annotate(verdict("UNSPECIFIED"))


def test_an_unknown_region(regions: Regions) -> None:
    """An unknown region is refused with the ones that the run has."""
    for ask in (lambda name: regions.annotate(verdict("UNSURE", region=name)), regions.get):
        with pytest.raises(NotFound, match=r"r9.*r1, r2"):
            ask("runs/first/regions/r9")


def test_pictures_of_a_region(regions: Regions, store: ArtifactStore) -> None:
    """The pictures are those that the distiller chose."""
    names = ("exemplars", "exemplar_sources", "nearest", "nearest_misclassified")
    arrays = {name: np.full((2, 8, 8, 1), value, np.uint8) for value, name in enumerate(names)}
    store.write_arrays(keys.region_arrays(R1), arrays)
    pictures = regions.pictures(R1)
    np.testing.assert_array_equal(pictures.exemplars, arrays["exemplars"])
    np.testing.assert_array_equal(pictures.sources, arrays["exemplar_sources"])
    np.testing.assert_array_equal(pictures.nearest, arrays["nearest"])
    np.testing.assert_array_equal(pictures.nearest_misclassified, arrays["nearest_misclassified"])


def test_the_export_holds_arrays_and_records(regions: Regions, store: ArtifactStore) -> None:
    """One safetensors file: every array of every region by its name, and the distiller's records as JSON."""
    for name, value in ((R1, 1.0), (R2, 2.0)):
        store.write_arrays(keys.region_arrays(name), {"mean": np.full(3, value), "source": np.arange(4)})
    content = regions.export(RUN)
    regions.annotate(verdict("MIXED"))
    store.write_message(keys.region_parts(R1), region_pb2.Distillation(regions=[region_pb2.Region(name=f"{R1}-1")]))
    assert regions.export(RUN) == content  # a broken download goes on
    arrays = safetensors.numpy.load(content)
    assert set(arrays) == {"r1.mean", "r1.source", "r2.mean", "r2.source"}
    np.testing.assert_array_equal(arrays["r2.mean"], np.full(3, 2.0))
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    record = json_format.Parse(header["__metadata__"]["distillation"], region_pb2.Distillation())
    assert record == store.read_message(keys.distillation(RUN.name), region_pb2.Distillation)
