"""The daemon's HTTP side (docs/http.md): OpenAI's API, health and metrics. Needs h11, the extra ``edge-rt[http]``."""
