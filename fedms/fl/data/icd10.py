"""The default data: short diagnoses of ICD-10-CM, to be filed under their chapter.

The texts come from the package ``simple-icd-10-cm`` (MIT), which carries the public classification
of the US CDC. A class is a chapter, a group is a 3-character category such as ``A01``. Siblings of
a category differ by a word or two, so a split by example would leak: split by group.
"""

from __future__ import annotations

import re
import warnings
from types import ModuleType

import numpy as np

from fedms.fl.data.federation import Dataset
from fedms.fl.types import DataError

MIN_CATEGORIES = 4
"""A chapter with fewer cannot stand in train, gate, val and test at once, and is left out."""

_CODE_RANGE = re.compile(r"\s*\(\w{3}-\w{3}\)$")


def load_icd10(*, max_per_category: int = 6, seed: int = 0) -> Dataset:
    """Diagnoses labelled with their ICD-10-CM chapter; takes about 3 s, nearly all in the package.

    Texts are the descriptions and inclusion terms of a category and of all codes below it, without
    the codes that only add a 7th character (", initial encounter" and the like). No text occurs
    twice, upper and lower case counting as equal: the first category that has it keeps it. Chapters
    with fewer than ``MIN_CATEGORIES`` categories are left out; in release 1.5.0 of the package that
    is chapter 22, codes for special purposes, with 2 categories: 21 classes remain.

    Args:
        max_per_category: at most so many texts a category: always the category's own description,
            then a sample that takes turns among its subcategories.
        seed: of that sample.

    Returns:
        A dataset with ``groups`` (the category's index, int64 [N]), without clients or splits.

    Raises:
        DataError: the package is not installed, or ``max_per_category`` is under 1.
    """
    if max_per_category < 1:
        raise DataError(f"max_per_category must be at least 1, got {max_per_category}")
    icd = _import_package()
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    texts: list[str] = []
    labels: list[int] = []
    groups: list[int] = []
    class_names: list[str] = []
    num_groups = 0
    for chapter, categories in _chapters(icd).items():
        if len(categories) < MIN_CATEGORIES:
            continue
        for category in categories:
            sample = _sample(_branches(icd, category, seen), max_per_category, rng)
            texts += sample
            labels += [len(class_names)] * len(sample)
            groups += [num_groups] * len(sample)
            num_groups += bool(sample)
        class_names.append(_CODE_RANGE.sub("", icd.get_description(chapter)))
    return Dataset(
        inputs=tuple(texts),
        labels=np.array(labels, dtype=np.int64),
        class_names=tuple(class_names),
        groups=np.array(groups, dtype=np.int64),
    )


def _import_package() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # importlib.resources.read_text
            import simple_icd_10_cm
    except ImportError as error:
        raise DataError(
            "the dataset 'icd10' needs the package simple-icd-10-cm: pip install 'fedms[demo]'"
        ) from error
    return simple_icd_10_cm


def _chapters(icd: ModuleType) -> dict[str, list[str]]:
    """The 3-character categories of every chapter, both in the classification's order."""
    chapters: dict[str, list[str]] = {}
    chapter = ""
    for code in icd.get_all_codes():
        if icd.is_chapter(code):
            chapter = code
            chapters[chapter] = []
        elif icd.is_category(code):
            chapters[chapter].append(code)
    return chapters


def _branches(icd: ModuleType, category: str, seen: set[str]) -> list[list[str]]:
    """Unseen texts of the category itself, then of each subcategory with all that is below it."""

    def children(code: str) -> list[str]:
        return [child for child in icd.get_children(code) if not icd.is_extended_subcategory(child)]

    def unseen(codes: list[str]) -> list[str]:
        found = []
        for code in codes:
            for text in (icd.get_description(code), *icd.get_inclusion_term(code)):
                if text.casefold() not in seen:
                    seen.add(text.casefold())
                    found.append(text)
        return found

    def with_all_below(code: str) -> list[str]:
        return [code, *(below for child in children(code) for below in with_all_below(child))]

    return [unseen([category]), *(unseen(with_all_below(child)) for child in children(category))]


def _sample(branches: list[list[str]], size: int, rng: np.random.Generator) -> list[str]:
    """At most ``size`` texts, one of each branch in turn, at random but for the first branch."""
    turns = []
    for number, branch in enumerate(branches):
        order = range(len(branch)) if number == 0 else rng.permutation(len(branch))
        turns += [(turn, number > 0, rng.random(), branch[i]) for turn, i in enumerate(order)]
    return [text for *_, text in sorted(turns)[:size]]
