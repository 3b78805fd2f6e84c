"""Checkpoints of other projects, read as memkit models."""

from memkit.interop import kvm_paper

__all__ = ["kvm_paper"]
