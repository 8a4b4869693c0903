"""Where labels are kept."""

from __future__ import annotations

from pydantic import model_validator

from cluster.spec.base import Section


class StoreSpec(Section):
    """The label store: a token that was scored once is not scored again, by whichever run."""

    enabled: bool = True
    """Keep labels and read those that are there. Off, a student that falls behind holds the others back."""
    uri: str | None = None
    """A folder, or `s3://bucket/prefix`; none means `labels` under the Stillhouse home."""

    @model_validator(mode="after")
    def _uri_has_effect(self) -> StoreSpec:
        if self.uri is not None and not self.enabled:
            raise ValueError("uri has no effect when enabled is false; leave one of them out")
        return self
