"""What SGLang's endpoints mean to the router: which generate, who may ask, and how each says that it failed. Pure.

A path that is not known here passes all the same, for those who may do anything: SGLang grows endpoints with each
release. Paths are compared as they came, undecoded: `/flush%5Fcache` is no endpoint that a tenant may use.
"""

import json
from dataclasses import dataclass
from typing import Literal

Dialect = Literal["openai", "anthropic", "sglang"]
Stream = Literal["generate", "completions", "chat", ""]
Salt = Literal["carried", "impossible", "needless"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`routed`: which worker answers matters. `salt`: whether its body can carry SGLang's `cache_salt`.

    `stream`: the shape of its events, where a stream that was cut can be continued.
    """

    routed: bool = False
    public: bool = False  # tenants may use it
    dialect: Dialect = "openai"
    salt: Salt = "needless"
    stream: Stream = ""
    everywhere: bool = False  # an order to all workers


# Read in SGLang 0.5.23: entrypoints/http_server.py; who has cache_salt: openai/protocol.py, managers/io_struct.py.
_ENDPOINTS = {
    "/v1/chat/completions": Endpoint(True, True, salt="carried", stream="chat"),
    "/v1/completions": Endpoint(True, True, salt="carried", stream="completions"),
    "/v1/responses": Endpoint(True, True, salt="carried"),
    "/generate": Endpoint(True, True, "sglang", "carried", stream="generate"),
    "/v1/messages": Endpoint(True, True, "anthropic", "impossible"),
    "/v1/embeddings": Endpoint(True, True, salt="impossible"),
    "/v1/classify": Endpoint(True, True, salt="impossible"),
    "/v1/rerank": Endpoint(True, True, salt="impossible"),
    "/v1/score": Endpoint(True, True, salt="impossible"),
    "/encode": Endpoint(True, True, "sglang", "impossible"),
    "/classify": Endpoint(True, True, "sglang", "impossible"),
    "/api/chat": Endpoint(True, True, "sglang", "impossible"),
    "/api/generate": Endpoint(True, True, "sglang", "impossible"),
    "/v1/messages/count_tokens": Endpoint(public=True, dialect="anthropic"),
    "/v1/tokenize": Endpoint(public=True),
    "/tokenize": Endpoint(public=True),
    "/v1/detokenize": Endpoint(public=True),
    "/detokenize": Endpoint(public=True),
    "/v1/models": Endpoint(public=True),
    "/model_info": Endpoint(public=True),
    "/get_model_info": Endpoint(public=True),
    "/health": Endpoint(public=True),
    "/ready": Endpoint(public=True),
}
_ORDERS = (
    "/abort_request", "/flush_cache", "/pause_generation", "/continue_generation", "/slow_down", "/freeze_gc",
    "/start_profile", "/stop_profile", "/set_trace_level", "/configure_logging", "/set_internal_state",
    "/update_weights_from_disk", "/update_weight_version", "/load_lora_adapter", "/unload_lora_adapter",
    "/release_memory_occupation", "/resume_memory_occupation", "/hicache/storage-backend/clear",
    "/start_expert_distribution_record", "/stop_expert_distribution_record", "/dump_expert_distribution_record",
)  # fmt: skip
_ENDPOINTS |= dict.fromkeys(_ORDERS, Endpoint(dialect="sglang", everywhere=True))
_OTHER = Endpoint(dialect="sglang")
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_OPENAI = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def endpoint(path: str) -> Endpoint:
    return _ENDPOINTS.get(path, _OTHER)


def error_body(dialect: Dialect, status: int, why: str) -> bytes:
    """A JSON error as the endpoint's own clients read it."""
    return json.dumps(_error(dialect, status, why)).encode()


def error_event(path: str, status: int, why: str) -> bytes:
    """The last event of a stream that cannot go on, so that its client knows. Whole, with its empty line."""
    known = endpoint(path)
    if known.dialect == "anthropic":
        return b"event: error\ndata: %b\n\n" % error_body("anthropic", status, why)
    if path == "/v1/responses":
        event = {"type": "error", "code": "server_error", "message": why, "param": None, "sequence_number": 0}
        return b"event: error\ndata: %b\n\n" % json.dumps(event).encode()
    # No [DONE] after it: a client that reads on to [DONE] without looking would take the text as complete.
    return b"data: %b\n\n" % error_body(known.dialect, status, why)


def _error(dialect: Dialect, status: int, why: str) -> dict[str, object]:
    if dialect == "anthropic":
        kind = _ANTHROPIC.get(status, "overloaded_error" if status == 503 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": why}}
    kind = _OPENAI.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": why, "type": kind, "param": None, "code": status}}
