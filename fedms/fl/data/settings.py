"""Where examples come from, and how they are shared out to clients and split."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fedms.fl.settings import Count, Natural, Positive, Section, Share


class DataConfig(Section):
    source: str = "icd10"
    """``icd10``, a name that ``fedms fetch`` brought, a .csv, .jsonl or .parquet file, a folder of
    .parquet files (as on the hub, too), or of a folder of images for each class."""
    text_column: str = "text"
    """Column of a table that holds the texts."""
    image_column: str = "image"
    """Column that holds the images: bytes, or names of files beside the table."""
    label_column: str = "label"
    """Column that holds the class, a string or an integer."""
    client_column: str | None = None
    """Column that names the owner of a row, for ``partitioner = "column"``."""
    group_column: str | None = None
    """Column whose equal values never stand on both sides of a split; default: equal texts."""
    split_column: str | None = None
    """Column that holds "train" or "test"; without it the names of Parquet files may say it, as
    they do on the hub, else the rows are split by the shares below."""
    class_names: dict[str, str] = Field(default_factory=dict)
    """Labels in words, for the head that reads names: ``data.class_names.J18 = "pneumonia"``."""
    max_per_category: Count = 4
    """``icd10`` only: texts kept of each 3-character category."""
    partitioner: Literal["iid", "dirichlet", "pathological", "column"] = "dirichlet"
    """How the examples are shared out to clients; "column": as they are in the data."""
    num_clients: Count = 20
    """Clients that take part. ``partitioner = "column"`` takes all that the data has."""
    alpha: Positive = 0.3
    """Dirichlet concentration: small means that clients differ much."""
    classes_per_client: Count = 4
    """For ``partitioner = "pathological"``."""
    min_partition_size: Natural = 20
    """Fewest training examples of a client; shares are drawn again until each has them."""
    unseen_clients: Natural = 4
    """Clients that take part in no round and are scored with what a newcomer would receive."""
    train: Share = 0.66
    """Share of the examples that the experts train on; with the next three it sums to 1."""
    gate: Share = 0.06
    """Share of the examples that neither expert trains on, for the gate alone."""
    val: Share = 0.08
    """Share of the examples that score the global expert for SAL."""
    test: Share = 0.20
    """Share of the examples that clients are scored on."""

    @model_validator(mode="after")
    def _shares_out_by_the_column_that_it_names(self) -> Self:
        if self.client_column is not None and self.partitioner != "column":
            raise ValueError(
                f'client_column = "{self.client_column}" says who owns a row, and partitioner = '
                f'"{self.partitioner}" shares rows out anew: set data.partitioner=column, or leave '
                "the column out"
            )
        return self
