"""The JSON schema of a policy file, by which editors complete and check it."""

from __future__ import annotations

import json

from memkit.policy import PolicySpec

__all__ = ["policy_schema"]

# What editors' YAML servers know best; no newer draft's feature is used.
DRAFT = "http://json-schema.org/draft-07/schema#"


def policy_schema() -> str:
    """The schema as JSON text, the kinds registered so far included.

    It knows every field, its kinds, its bounds and its description; rules that span pieces are checked at loading.
    """
    schema = {"$schema": DRAFT, **PolicySpec.model_json_schema(), "title": "memkit policy"}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
