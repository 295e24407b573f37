"""Chooses the adapter for a plan."""

from convserve_client.loadgen.plan import Plan
from convserve_client.loadgen.protocols.adapter import ProtocolAdapter
from convserve_client.loadgen.protocols.classify import ClassifyAdapter
from convserve_client.loadgen.protocols.open_inference import OpenInferenceAdapter


def adapter_for(plan: Plan) -> ProtocolAdapter:
    return OpenInferenceAdapter() if plan.protocol == "oip" else ClassifyAdapter()
