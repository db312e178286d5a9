"""Size of a GGUF file, and how fast llama.cpp generates with it on the CPU: the one file that imports its wheel.

    python -m evaluation.profile.llama_cpp FILE '{"prompt_len": 128}' THREADS

llama.cpp ends its whole process where something fails in it, so it has one of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from evaluation.errors import EvaluationError
from evaluation.profile.child import end_with_parent, last_line_of
from evaluation.profile.config import FileProfileConfig
from evaluation.profile.device import processor_name
from evaluation.profile.report import FileProfile, Speed, Timing


def installed_runtime() -> str:
    """Which llama.cpp, on which processor: "xllamacpp 2026.10.1 on ... (8 cores)"; "" if its wheel is not installed."""
    try:
        return f"xllamacpp {metadata.version('xllamacpp')} on {processor_name()} ({os.cpu_count()} cores)"
    except metadata.PackageNotFoundError:
        return ""


def profile_file(file: Path, config: FileProfileConfig, *, runtime: str, threads: int) -> FileProfile:
    """Measure it. runtime: what `installed_runtime` said when the run was planned; with "" nothing is timed.

    Raises EvaluationError if llama.cpp fails, or is not what it was.
    """
    report = FileProfile(file_bytes=file.stat().st_size, runtime=runtime, **config.model_dump())
    if not runtime:
        return report
    if (now := installed_runtime()) != runtime:
        raise EvaluationError(f"this run was planned with {runtime}, and there is {now or 'none'} here: run it again")
    arguments = [str(file.resolve()), config.model_dump_json(), str(threads)]
    told = last_line_of("evaluation.profile.llama_cpp", arguments, f"llama.cpp's speed with {file}")
    return report.model_copy(update={"threads": threads, "speed": Speed.model_validate_json(told)})


def main(arguments: list[str] | None = None) -> None:
    """The child: prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.profile.llama_cpp")
    parser.add_argument("file", type=Path)
    parser.add_argument("config", type=FileProfileConfig.model_validate_json)
    parser.add_argument("threads", type=int)
    given = parser.parse_args(arguments)
    end_with_parent()
    server, config = _server(given.file, given.config, given.threads), given.config
    runs = [_timed_run(server, config) for _ in range(config.warmup + config.runs)][config.warmup :]
    sys.stdout.write(f"\n{_speed(runs, config.new_tokens).model_dump_json()}\n")
    sys.stdout.flush()
    os._exit(0)  # its threads take seconds to end


def _server(file: Path, config: FileProfileConfig, threads: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = config.prompt_len + config.new_tokens, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = params.fit_params = False
    params.verbosity = 0
    return xllamacpp.Server(params)


def _timed_run(server: Any, config: FileProfileConfig) -> tuple[float, float]:
    """Milliseconds of the prompt, up to the first token, and of all that is generated after it."""
    prompt = [place % 97 for place in range(config.prompt_len)]  # any ids: which they are takes no time
    answer = server.handle_completions(
        {
            **{"prompt": prompt, "max_tokens": config.new_tokens, "temperature": 0.0, "top_k": 1},
            **{"ignore_eos": True, "cache_prompt": False},
        }
    )
    timings = answer["timings"]
    counted = timings["prompt_n"], timings["predicted_n"]
    asked = config.prompt_len, config.new_tokens
    assert counted == asked, f"llama.cpp timed {counted} tokens of prompt and answer, not {asked}"
    return float(timings["prompt_ms"]), float(timings["predicted_ms"])


def _speed(runs: list[tuple[float, float]], new_tokens: int) -> Speed:
    prefill = Timing.of([prompt_ms for prompt_ms, _ in runs])
    latency = Timing.of([sum(run) for run in runs])
    decode = Timing.of([predicted / (new_tokens - 1) for _, predicted in runs]) if new_tokens > 1 else None
    return Speed(
        prefill_ms=prefill,
        ttft_ms=prefill,
        decode_ms_per_token=decode,
        latency_ms=latency,
        tokens_per_s=1000 * new_tokens / latency.p50,
        decode_tokens_per_s=1000 / decode.p50 if decode else None,
    )


if __name__ == "__main__":
    main()
