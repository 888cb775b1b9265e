"""`edge-rt serve`: the daemon."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_rt import model_hub
from edge_rt.cli.options import ModelOptions, option
from edge_rt.cli.output import say
from edge_rt.errors import OptionError

if TYPE_CHECKING:
    from edge_rt.daemon.address import Address, Listener
    from edge_rt.daemon.config import Config, HttpConfig, RecordConfig
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
        from edge_rt.daemon import address as addresses

        config = configured(self)
        if self.check:
            return check(config)
        import asyncio
        import logging

        from edge_rt.daemon.server import serve

        logging.basicConfig(level="INFO" if self.verbose else "WARNING", format="%(levelname)s %(name)s: %(message)s")
        recorder = _recorder(config)
        listeners = listen(config, addresses.systemd_listeners())
        where = ", ".join(shown(one.address, one.http) for one in listeners)
        asyncio.run(serve(config, listeners, lambda: say(f"edge-rt listens at {where}"), recorder))
        return 0


def _recorder(config: Config) -> Recorder | None:
    """What records traffic, if that is asked for: only then does this process import plugins."""
    if config.record is None:
        return None
    from edge_rt.daemon.recording import open_recorder

    return open_recorder(config.record)


def configured(options: ServeCommand) -> Config:
    """The configuration file with what the command line says. Raises OptionError, RuleError."""
    from edge_rt.daemon import address as addresses
    from edge_rt.daemon import config as configuration

    if options.pack and options.no_pack:
        raise OptionError("--pack and --no-pack contradict each other; give one of them")
    config = configuration.read_config(Path(options.config)) if options.config is not None else configuration.default_config()
    more: dict[str, Any] = {
        "context": options.ctx,
        "threads": options.threads,
        "memory": model_hub.parse_size(options.memory, "--memory") if options.memory is not None else None,
        "pack": options.pack if options.pack or options.no_pack else None,
        "key_type": options.key_type,
        "engine": options.engine,
        "device": options.device,
        "policy": options.policy,
        "embedder": options.embedder,
        "compensation": (
            options.compensation if options.compensation in (None, "auto", "off") else str(Path(options.compensation).absolute())
        ),
        "power": options.power,
        "celsius": options.celsius,
    }
    listen_at = tuple(map(addresses.parse, options.listen)) or config.listen or (addresses.default_address(),)
    http = config.http
    if options.http:
        http = (http or configuration.HttpConfig())._replace(listen=tuple(map(addresses.parse, options.http)))
    record = config.record
    if options.record is not None:
        file = Path(options.record).absolute()
        record = configuration.RecordConfig(file) if record is None else record._replace(file=file)
    config = config._replace(
        listen=listen_at,
        record=record,
        model=options.model or config.model,
        model_options={**config.model_options, **{name: value for name, value in more.items() if value is not None}},
        rules=str(Path(options.rules).absolute()) if options.rules is not None else config.rules,
        http=http,
    )
    if config.key is None and any(one.kind == "tcp" for one in config.listen):
        raise OptionError("a TCP port is open to every user of this machine; set key_file in the configuration, see docs/daemon.md")
    return config


def _check_http(http: HttpConfig | None, at: Sequence[Address]) -> None:
    """Raises OptionError for HTTP that cannot be, or is open to all by mistake."""
    from importlib.util import find_spec

    if at and find_spec("h11") is None:
        raise OptionError("HTTP needs the package h11; pip install 'edge-rt[http]'")
    if not (http and (http.keys or http.open)) and any(one.kind == "tcp" for one in at):
        raise OptionError(
            "HTTP on a TCP port is open to every process of this machine; give a path, or set key_file, or open = true if that is meant, "
            "in [http] of the configuration, see docs/http.md"
        )


def shown(address: Address, http: bool) -> str:
    """Where one can reach us."""
    return f"{'http at ' if http else ''}{address}"


def wanted(config: Config, activated: Sequence[Listener] = ()) -> list[tuple[Address, bool]]:
    """Where to listen, and whether HTTP is spoken there; what systemd listens at for us is not among it, nor what that is instead of.

    Raises OptionError.
    """
    given = {one.http for one in activated}
    own = config.listen if False not in given else ()
    http = config.http.listen if config.http is not None and True not in given else ()
    _check_http(config.http, [*http, *(one.address for one in activated if one.http)])
    found = [*((one, False) for one in own), *((one, True) for one in http)]
    fixed = [address for address, _ in found if address.kind != "tcp" or address.port]
    if twice := next((one for one in fixed if fixed.count(one) > 1), None):
        raise OptionError(f"{twice} is given twice; name another address, or leave one out")
    return found


def listen(config: Config, activated: Sequence[Listener] = ()) -> list[Listener]:
    """Listen at all addresses; those of a kind for which systemd listens count no more. Raises OptionError."""
    from edge_rt.daemon import address as addresses

    found: list[Listener] = list(activated)
    try:
        for address, http in wanted(config, activated):
            found.append(addresses.listen(address)._replace(http=http))
    except BaseException:
        for listener in found:
            listener.close()
        raise
    return found


def check(config: Config) -> int:
    """Whether all would go well, without doing it. Raises what would go wrong."""
    from edge_rt.daemon import address as addresses

    for address, http in wanted(config):
        addresses.check_address(address)
        say(f"would listen at {shown(address, http)}")
    users = ", ".join("root" if one == 0 else "you" if one == os.getuid() else str(one) for one in sorted(config.users))
    say(f"would let in {users}")
    if config.rules is not None:
        from edge_rt.plugin_host.registry import Registry
        from edge_rt.postprocess.rules import RuleFile

        book = RuleFile(config.rules, Registry.load(), watch=False)
        say(f"would post-process by {config.rules}, version {book.current.version}")
    if config.record is not None:
        _check_record(config.record)
    _check_models(config)
    return 0


def _check_record(record: RecordConfig) -> None:
    """Say what would be recorded. Raises OptionError, RuleError, PluginError."""
    from edge_rt.daemon.recording import trace as file
    from edge_rt.daemon.recording import trace as redaction

    found = redaction.load_redaction(record.rules)
    file.check_trace_file(record.file)
    what = "requests" if record.sample == 1 else f"{100 * record.sample:g} % of the requests"
    say(f"would record {what} {'and their answers' if record.answers else 'without their answers'} in {record.file}")
    say(f"would redact what is recorded: {found.by}")


def _check_models(config: Config) -> None:
    """Say which models there would be, and what they need. Raises ModelFileError, OptionError."""
    from edge_rt.core.gguf import model_file
    from edge_rt.core.gguf.lora import open_lora
    from edge_rt.core.gguf.model_file import ModelFile
    from edge_rt.core.weights import error_correction
    from edge_rt.daemon.models import check_model_name, default_memory_budget, estimate_memory
    from edge_rt.daemon.supervisor import WorkerSpec
    from edge_rt.model_hub import resolve_model

    budget = config.memory or default_memory_budget()
    if config.model is None:
        say("would wait for a client to load a model" if not config.models else "would open no model before it is asked for")
    given = [("would open", config.model, config.model_options)] if config.model is not None else []
    for verb, model, options in [*given, *((f"would know {name}:", *model) for name, model in config.models.items())]:
        path = resolve_model(model)
        with ModelFile.open(path) as file:
            model_file.check_metadata(file)
            spec = WorkerSpec(str(path), options)
            if model is config.model:
                check_model_name(model, spec, config.models)
            needs = estimate_memory(spec).total
            say(f"{verb} {path}, architecture {file.header.architecture}, which needs about {model_hub.format_size(needs)}")
            if (side := error_correction.find_compensation(path, options.get("compensation", error_correction.AUTO))) is not None:
                with error_correction.open_compensation(side, file).file:
                    say(f"would apply its compensation {side}")
            for name, adapter in options.get("adapters", {}).items():
                with open_lora(adapter, file.header).file:
                    say(f"would offer its adapter {name}, {adapter}")
        if needs > budget:
            raise OptionError(
                f"{model} needs {model_hub.format_size(needs)} and all models may have {model_hub.format_size(budget)}; raise memory"
            )
    say(f"would let models have {model_hub.format_size(budget)} together")
