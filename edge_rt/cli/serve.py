"""`edge-rt serve`: configures, checks and starts the daemon."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_rt.cli.options import ModelOptions, option
from edge_rt.cli.output import write_stderr
from edge_rt.daemon import address as addresses
from edge_rt.daemon.address import Address, Listener
from edge_rt.daemon.config import Config, HttpConfig, RecordConfig, default_config, read_config
from edge_rt.errors import OptionError
from edge_rt.model_hub import format_size, parse_size, resolve_model

if TYPE_CHECKING:
    from edge_rt.daemon.recording import Recorder


class ServeCommand(ModelOptions):
    """Serve a model to other programs on this machine.

    The daemon listens at a socket that only you can open, and speaks the protocol of docs/protocol.md. Without --model it waits until a
    client asks for one. SIGTERM and Ctrl-C let requests come to their end; a second one does not. SIGHUP reads the rules again.

    Examples:
      edge-rt serve -m smollm2
      edge-rt serve -m model.gguf --listen /run/user/1000/llm.sock --rules rules.toml
      edge-rt serve -m smollm2 --http /run/user/1000/llm-http.sock
      edge-rt serve --config daemon.toml --check
    """

    model: str = option("", "-m --model MODEL", "GGUF file, or a name from `edge-rt models`; none if left out.")
    listen: tuple[str, ...] = option((), "--listen ADDRESS", "A path, abstract:NAME or tcp:127.0.0.1:PORT. May be given several times.")
    http: tuple[str, ...] = option((), "--http ADDRESS", "Speak HTTP, with OpenAI's API, at this address too, see docs/http.md.")
    config: str | None = option(None, "--config FILE", "Configuration, see docs/daemon.md. Options of this command come before it.")
    pack: bool = option(False, "--pack", "Run with packed weights, also if the configuration says not to.")
    check: bool = option(False, "--check", "Say what would happen, or what is wrong, and do nothing.")
    rules: str | None = option(None, "--rules FILE", "Rules for post-processors, see docs/postprocessing.md.")
    record: str | None = option(None, "--record FILE", "Record what is asked, redacted, see docs/daemon.md.")
    policy: str | None = option(None, "--policy NAME", "What leaves a context that gets short: strict (nothing), slide or graded.")
    verbose: bool = option(False, "-v --verbose", "Say on standard error what becomes of the worker.")
    embedder: str | None = option(None, "--embedder NAME", "Embedder to recall by, see `edge-rt plugins`; the model's own if left out.")

    def run(self) -> int:
        config = configured(self)
        if self.check:
            _check(config)
            return 0
        from edge_rt.daemon.server import serve

        logging.basicConfig(level="INFO" if self.verbose else "WARNING", format="%(levelname)s %(name)s: %(message)s")
        recorder = _recorder(config)
        listeners = _listen(config)
        where = ", ".join(_place(one.address, one.http) for one in listeners)
        asyncio.run(serve(config, listeners, lambda: write_stderr(f"edge-rt listens at {where}"), recorder))
        return 0


def _recorder(config: Config) -> Recorder | None:
    """The recorder of requests, if the configuration wants one. Only then does this process import plugins."""
    if config.record is None:
        return None
    from edge_rt.daemon.recording import open_recorder

    return open_recorder(config.record)


def configured(options: ServeCommand) -> Config:
    """The configuration file, overridden by the command line. Raises OptionError, RuleError."""
    if options.pack and options.no_pack:
        raise OptionError("--pack and --no-pack contradict each other; give one of them")
    config = read_config(Path(options.config)) if options.config is not None else default_config()
    model_options: dict[str, Any] = {
        "context": options.ctx,
        "threads": options.threads,
        "memory": parse_size(options.memory, "--memory") if options.memory is not None else None,
        "pack": options.pack if options.pack or options.no_pack else None,
        "key_type": options.key_type,
        "engine": options.engine,
        "device": options.device,
        "policy": options.policy,
        "embedder": options.embedder,
        "compensation": options.compensation if options.compensation in ("auto", "off") else _absolute(options.compensation),
        "power": options.power,
        "celsius": options.celsius,
    }
    http, record, record_file = config.http, config.record, _absolute(options.record)
    if options.http:
        http = (http or HttpConfig())._replace(listen=tuple(map(addresses.parse, options.http)))
    if record_file is not None:
        record = record._replace(file=Path(record_file)) if record else RecordConfig(Path(record_file))
    config = config._replace(
        listen=tuple(map(addresses.parse, options.listen)) or config.listen or (addresses.default_address(),),
        record=record,
        model=options.model or config.model,
        model_options={**config.model_options, **{name: value for name, value in model_options.items() if value is not None}},
        rules=_absolute(options.rules) or config.rules,
        http=http,
    )
    if config.key is None and any(one.kind == "tcp" for one in config.listen):
        raise OptionError("a TCP port is open to every user of this machine; set key_file in the configuration, see docs/daemon.md")
    return config


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


# ---- listening -------------------------------------------------------------------------------------------------------


def _check_http(http: HttpConfig | None, at: Sequence[Address]) -> None:
    """Raise OptionError if HTTP cannot be served at these addresses, or would be open to all without being meant to."""
    if at and importlib.util.find_spec("h11") is None:
        raise OptionError("HTTP needs the package h11; pip install 'edge-rt[http]'")
    if not (http and (http.keys or http.open)) and any(one.kind == "tcp" for one in at):
        raise OptionError(
            "HTTP on a TCP port is open to every process of this machine; give a path, or set key_file, or open = true if that is meant, "
            "in [http] of the configuration, see docs/http.md"
        )


def _place(address: Address, http: bool) -> str:
    return f"{'http at ' if http else ''}{address}"


def _addresses(config: Config, systemd: Sequence[Listener] = ()) -> list[tuple[Address, bool]]:
    """Where to listen, and whether HTTP is spoken there. Raises OptionError.

    A protocol for which systemd listens (``systemd``) has no other addresses.
    """
    given = {one.http for one in systemd}
    own = config.listen if False not in given else ()
    http = config.http.listen if config.http is not None and True not in given else ()
    _check_http(config.http, [*http, *(one.address for one in systemd if one.http)])
    found = [*((one, False) for one in own), *((one, True) for one in http)]
    fixed = [address for address, _ in found if address.kind != "tcp" or address.port]
    if twice := next((one for one in fixed if fixed.count(one) > 1), None):
        raise OptionError(f"{twice} is given twice; name another address, or leave one out")
    return found


def _listen(config: Config) -> list[Listener]:
    """Listen at all addresses. Raises OptionError."""
    listeners = addresses.systemd_listeners()
    try:
        for address, http in _addresses(config, listeners):
            listeners.append(addresses.listen(address)._replace(http=http))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


# ---- edge-rt serve --check -------------------------------------------------------------------------------------------


def _check(config: Config) -> None:
    """Say what the daemon would do, without doing it. Raises what would make it fail."""
    for address, http in _addresses(config):
        addresses.check_address(address)
        write_stderr(f"would listen at {_place(address, http)}")
    users = ", ".join("root" if one == 0 else "you" if one == os.getuid() else str(one) for one in sorted(config.users))
    write_stderr(f"would let in {users}")
    if config.rules is not None:
        from edge_rt.plugin_host.registry import Registry
        from edge_rt.postprocess.rules import RuleFile

        book = RuleFile(config.rules, Registry.load(), watch=False)
        write_stderr(f"would post-process by {config.rules}, version {book.current.version}")
    if config.record is not None:
        _check_record(config.record)
    _check_models(config)


def _check_record(record: RecordConfig) -> None:
    """Say what would be recorded. Raises OptionError, RuleError, PluginError."""
    from edge_rt.daemon.recording.trace import check_trace_file, load_redaction

    redaction = load_redaction(record.rules)
    check_trace_file(record.file)
    what = "requests" if record.sample == 1 else f"{100 * record.sample:g} % of the requests"
    write_stderr(f"would record {what} {'and their answers' if record.answers else 'without their answers'} in {record.file}")
    write_stderr(f"would redact what is recorded: {redaction.by}")


def _check_models(config: Config) -> None:
    """Say which models there would be, and how much memory they need. Raises ModelFileError, OptionError."""
    from edge_rt.core.gguf.lora import open_lora
    from edge_rt.core.gguf.model_file import ModelFile, check_metadata
    from edge_rt.core.weights.error_correction import AUTO, find_compensation, open_compensation
    from edge_rt.daemon.models import check_model_name, default_memory_budget, estimate_memory
    from edge_rt.daemon.supervisor import WorkerSpec

    budget = config.memory or default_memory_budget()
    if config.model is None:
        write_stderr("would wait for a client to load a model" if not config.models else "would open no model before it is asked for")
    given = [("would open", config.model, config.model_options)] if config.model is not None else []
    for verb, model, options in [*given, *((f"would know {name}:", *model) for name, model in config.models.items())]:
        path = resolve_model(model)
        with ModelFile.open(path) as file:
            check_metadata(file)
            spec = WorkerSpec(str(path), options)
            if model is config.model:
                check_model_name(model, spec, config.models)
            needs = estimate_memory(spec).total
            write_stderr(f"{verb} {path}, architecture {file.header.architecture}, which needs about {format_size(needs)}")
            if (side := find_compensation(path, options.get("compensation", AUTO))) is not None:
                with open_compensation(side, file).file:
                    write_stderr(f"would apply its compensation {side}")
            for name, adapter in options.get("adapters", {}).items():
                with open_lora(adapter, file.header).file:
                    write_stderr(f"would offer its adapter {name}, {adapter}")
        if needs > budget:
            raise OptionError(f"{model} needs {format_size(needs)} and all models may have {format_size(budget)}; raise memory")
    write_stderr(f"would let models have {format_size(budget)} together")
