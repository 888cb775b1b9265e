"""What `hooks.py` shows of the core without importing it: names of its own, and where each is at home."""

from __future__ import annotations

HOMES = {
    "AhoCorasick": ("edge_rt.core.assemble.aho_corasick", "AhoCorasick"),
    "CpuSensors": ("edge_rt.sensors", "CpuSensors"),
    "Candidate": ("edge_rt.core.context.candidates", "Candidate"),
    "CodeSpans": ("edge_rt.core.assemble.code_spans", "CodeSpans"),
    "HALF_WIDTH": ("edge_rt.core.assemble.width", "HALF_WIDTH"),
    "Contribution": ("edge_rt.core.context.grading", "Contribution"),
    "Grade": ("edge_rt.core.context.grading", "Grade"),
    "LoraFile": ("edge_rt.core.load.adapter", "LoraFile"),
    "ModelFile": ("edge_rt.core.load.model_file", "ModelFile"),
    "Positions": ("edge_rt.core.context.positions", "Positions"),
    "Rules": ("edge_rt.core.assemble.rules", "Rules"),
    "Run": ("edge_rt.core.context.positions", "Run"),
    "Segment": ("edge_rt.core.context.segments", "Segment"),
    "available_cpus": ("edge_rt.config", "available_cpus"),
    "board_name": ("edge_rt.cpuinfo", "board"),
    "cpu_processors": ("edge_rt.cpuinfo", "processors"),
    "cpu_profile": ("edge_rt.cpu_profile", "cpu_profile"),
    "cpu_topology": ("edge_rt.topology", "cpu_topology"),
    "content_grader": ("edge_rt.core.context.grading", "content_grader"),
    "ggml_features": ("edge_rt.native.ggml", "cpu_features"),
    "ggml_unsupported": ("edge_rt.core.graph.support", "unsupported"),
    "open_ggml_engine": ("edge_rt.core.ggml_engine", "GgmlEngine"),
    "keep_graded": ("edge_rt.core.context.policies", "keep_graded"),
    "keep_slide": ("edge_rt.core.context.policies", "keep_slide"),
    "keep_strict": ("edge_rt.core.context.policies", "keep_strict"),
    "install_native_log": ("edge_rt.native.logs", "install"),
    "recent_native_errors": ("edge_rt.native.logs", "recent_errors"),
}
"""Name in hooks -> module and name there."""
