"""The web application: one page, and the API that it uses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import Annotated, Any, BinaryIO, Literal, cast
from urllib.parse import quote

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from lungscope import __version__
from lungscope.errors import (
    BusyError,
    LungscopeError,
    MediaTypeError,
    MissingExtraError,
    NotFoundError,
    NotReadyError,
    RequestError,
    SlowUploadError,
    TooLargeError,
)
from lungscope.pipeline import Analyzer
from lungscope.report import DISCLAIMER
from lungscope.web.answers import BLOCK, ErrorBody, Outbox, Problem, answer, body
from lungscope.web.jobs import FINISHED, Job, Jobs, Upload
from lungscope.web.limits import Gate, Limits
from lungscope.web.metrics import Metrics
from lungscope.web.parts import PARTS, Part, Result, write_all

STATIC = Path(__file__).parent / "static"
#: What an uploaded file may say that it is. What it is, its content decides.
MEDIA_TYPES = ("image/png", "image/jpeg", "image/tiff", "image/bmp", "application/dicom", "application/octet-stream")
FIELD = "file"
#: Parts that are made at once, and that may wait for it.
MAKERS, MAKERS_QUEUE = 4, 64
#: A job's key, 128 random bits in the alphabet of URLs.
KEY = r"^[A-Za-z0-9_-]{22}$"
#: Bytes of a list of keys: as many as browsers send of a page that is left, some 2600 keys.
KEYS_BYTES = 2**16


class Analysis(BaseModel):
    """One film. stage: that is running. error: why it failed. report: the content of report.json, once it is done."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "3q2-7wAAAAAAAAAAAAAAAA",
                "name": "film.dcm",
                "status": "running",
                "stage": "segmentation",
                "error": None,
                "report": None,
            }
        }
    )

    id: str
    name: str
    status: Literal["queued", "running", "done", "failed", "deleted"]
    stage: str | None
    error: Problem | None
    report: dict[str, Any] | None


class Model(BaseModel):
    """The weights bundle in use. labels: None where it only segments. weights: SHA-256 by file name."""

    name: str
    version: str
    licence: str
    segmenter: list[str]
    classifier: str | None
    labels: list[str] | None
    weights: dict[str, str]
    device: str
    precision: str


class Models(BaseModel):
    models: list[Model]


class Health(BaseModel):
    """waiting: films that arrive, wait or are analysed. upload_bytes: the most that one film's file may have.
    kept_seconds: how long a result stays after it was last asked for."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "status": "ok",
                "version": __version__,
                "waiting": 0,
                "upload_bytes": 67108864,
                "kept_seconds": 1800.0,
                "demo": True,
            }
        }
    )

    status: Literal["ok"]
    version: str
    waiting: int
    upload_bytes: int
    kept_seconds: float
    demo: bool


@dataclass(frozen=True)
class Service:
    """What the routes work with. demo: the demo film's file, None where its package is not installed."""

    analyzer: Analyzer
    limits: Limits
    jobs: Jobs
    metrics: Metrics
    makers: CapacityLimiter
    outbox: Outbox
    demo: Path | None


def create_app(
    analyzer: Analyzer,
    *,
    limits: Limits | None = None,
    hosts: Iterable[str] = (),
    workers: int = 2,
    keep: Path | None = None,
    demo: Path | None = None,
) -> ASGIApp:
    """The application around a ready analyzer.

    hosts: names beside localhost and IP addresses that it answers to. workers: films analysed at once. keep: a folder
    that every part of every result is written to. demo: the film that is one click away.
    """
    limits, metrics = limits or Limits(), Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        writer = None if keep is None else partial(write_all, root=keep)
        jobs, outbox = Jobs(analyzer, limits, metrics, workers=workers, keep=writer), Outbox(limits.unread_bytes)
        app.state.service = Service(analyzer, limits, jobs, metrics, CapacityLimiter(MAKERS), outbox, demo)
        sweeper = asyncio.create_task(jobs.sweep())
        yield
        sweeper.cancel()
        await jobs.close()

    app = FastAPI(
        title="lungscope",
        version=__version__,
        summary="Lungs, a calibrated class, its evidence and a severity per lung zone, from a chest X-ray.",
        description=f"{DISCLAIMER} Films stay on this machine; results go when they are not asked for any longer.",
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        default_response_class=JSONResponse,
    )
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_exception_handler(LungscopeError, _on_lungscope_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_unforeseen)
    return Gate(app, limits, metrics, frozenset(name.lower() for name in hosts))


def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


ServiceOf = Annotated[Service, Depends(_service)]
Key = Annotated[str, PathParameter(pattern=KEY, description="The analysis's `id`.")]
Wait = Annotated[bool, Query(description="Answer when the film is done, not when it is queued.")]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": HTTPStatus(status).phrase} for status in statuses}


#: What the gate and the parser may answer to every request.
_ALWAYS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody, "description": "Refused: see the error's code"}}
_NOT_FOUND = _errors(404)
_FORM = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {
                    FIELD: {
                        "type": "string",
                        "format": "binary",
                        "description": "One frontal chest film: PNG, JPEG, TIFF, BMP or DICOM.",
                    }
                },
            },
            "encoding": {FIELD: {"contentType": ", ".join(MEDIA_TYPES)}},
        }
    },
}

_KEYS = TypeAdapter(list[str])

router = APIRouter(responses=_ALWAYS)


@router.post(
    "/v1/analyses",
    status_code=202,
    tags=["analyses"],
    summary="Send a film",
    responses={
        200: {"model": Analysis, "description": "Done (with `wait`)"},
        **_errors(403, 408, 413, 415, 422, 500, 503),
    },
    openapi_extra={"requestBody": _FORM},
)
async def create(request: Request, response: Response, service: ServiceOf, wait: Wait = False) -> Analysis:
    """Queue one film. With `wait`, a film that can not be used is answered with its error and is not kept."""
    job = await service.jobs.accept(lambda: _receive(request, service.limits))
    return await _created(job, service, response, wait, f"analyses/{job.key}")


@router.post(
    "/v1/analyses/demo",
    status_code=202,
    tags=["analyses"],
    summary="Analyse the demo film",
    responses={200: {"model": Analysis, "description": "Done (with `wait`)"}, **_errors(403, 413, 422, 500, 501, 503)},
)
async def create_demo(response: Response, service: ServiceOf, wait: Wait = False) -> Analysis:
    """Queue a real chest film, out of the package pydicom-data."""
    path = service.demo
    if path is None:
        raise MissingExtraError("The demo film", "demo")

    async def arriving() -> Upload:
        return Upload(path.name, path.open("rb"))

    job = await service.jobs.accept(arriving)
    return await _created(job, service, response, wait, job.key)


@router.get("/v1/analyses/{key}", tags=["analyses"], summary="Ask for an analysis", responses=_NOT_FOUND)
async def show(key: Key, service: ServiceOf) -> Analysis:
    """Where an analysis is; with its report when it is done, or its error when it failed."""
    return _analysis(service.jobs.get(key))


@router.delete("/v1/analyses/{key}", status_code=204, tags=["analyses"], responses={**_errors(403), **_NOT_FOUND})
async def delete(key: Key, service: ServiceOf) -> None:
    """Remove a film and all that was made of it. What `--keep` had written by then stays."""
    service.jobs.delete(service.jobs.get(key))


@router.delete(
    "/v1/analyses",
    status_code=204,
    tags=["analyses"],
    summary="Delete many",
    responses=_errors(400, 403, 408, 413),
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _KEYS.json_schema()}}}},
)
async def delete_many(request: Request, service: ServiceOf) -> None:
    """Remove each film that is listed by its `id`; those that are not kept any longer are passed over."""
    listed = b""
    async with _in_time(service.limits):
        async for block in request.stream():
            listed += block
            if len(listed) > KEYS_BYTES:
                raise TooLargeError(f"The list has more than {KEYS_BYTES:,} bytes. Send it in parts.")
    try:
        keys = _KEYS.validate_json(listed)
    except ValidationError:
        raise RequestError("The body is no list of ids. Send them as JSON, as in openapi.json.") from None
    for key in keys:
        with suppress(NotFoundError):
            service.jobs.delete(service.jobs.get(key))
        await asyncio.sleep(0)  # so that others are answered meanwhile


@router.get(
    "/v1/analyses/{key}/events",
    tags=["analyses"],
    summary="Follow an analysis",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Server-sent events `progress`, the last of them `done`, `failed` or `deleted`.",
            "content": {
                "text/event-stream": {
                    "example": 'event: progress\ndata: {"status": "running", "stage": "segmentation"}\n\n',
                }
            },
        },
        **_NOT_FOUND,
    },
)
async def events(key: Key, service: ServiceOf) -> StreamingResponse:
    """Every stage as it begins, from the first on, whenever the stream is opened."""
    return StreamingResponse(_stream(service.jobs.get(key)), media_type="text/event-stream")


@router.get(
    "/v1/analyses/{key}/{part}",
    tags=["analyses"],
    summary="Ask for a part of a result",
    response_class=Response,
    responses={
        200: {
            "description": " ".join(f"`{name}`: {part.about}" for name, part in PARTS.items()),
            "content": {
                media: {"schema": {"type": "object"} if "json" in media else {"type": "string", "format": "binary"}}
                for media in (part.media.partition(";")[0] for part in PARTS.values())
            },
        },
        **_errors(404, 409, 422, 500, 503),
    },
)
async def part(
    key: Key, part: Annotated[str, PathParameter(json_schema_extra={"enum": list(PARTS)})], service: ServiceOf
) -> Response:
    """A part is made when it is asked for. A film that failed answers with its error."""
    job, made = service.jobs.get(key), PARTS.get(part)
    if made is None:
        raise NotFoundError(f"A result has no part {part!r}. It has {', '.join(PARTS)}.")
    if job.error is not None:
        raise job.error.with_traceback(None)
    report = job.report
    if report is None:
        raise NotReadyError(f"{job.name} is still {job.status}. Follow its events, then ask again.")
    if service.makers.statistics().tasks_waiting >= MAKERS_QUEUE:
        raise BusyError(f"{MAKERS_QUEUE} parts are being made. Wait, then ask again.", retry_after=2)
    data = await anyio.to_thread.run_sync(_made, made, Result(job, report), limiter=service.makers)
    name = quote(f"{PurePosixPath(job.name).stem}-{part}", safe="")
    kind = "attachment" if made.save else "inline"
    headers = {"Content-Disposition": f"{kind}; filename*=utf-8''{name}"}
    if isinstance(data, bytes):
        return Response(data, media_type=made.media, headers=headers)
    return service.outbox.answer(data, made.media, headers)


@router.get("/v1/models", tags=["server"])
async def models(service: ServiceOf) -> Models:
    """The weights in use."""
    bundle, analyzer = service.analyzer.bundle, service.analyzer
    spec = bundle.classifier
    model = Model(
        name=bundle.name,
        version=bundle.version,
        licence=str(bundle.manifest["licence"]),
        segmenter=[member.network for member in bundle.segmenter.members],
        classifier=None if spec is None else spec.weights.network,
        labels=None if spec is None else list(spec.labels),
        weights={weights.path.name: weights.sha256 for weights in bundle.weights},
        device=analyzer.device,
        precision=analyzer.precision,
    )
    return Models(models=[model])


@router.get("/healthz", tags=["server"])
async def health(service: ServiceOf) -> Health:
    """Whether the server answers, and what it takes."""
    return Health(
        status="ok",
        version=__version__,
        waiting=service.jobs.waiting,
        upload_bytes=service.limits.upload_bytes,
        kept_seconds=service.limits.kept_seconds,
        demo=service.demo is not None,
    )


@router.get(
    "/metrics",
    tags=["server"],
    response_class=PlainTextResponse,
    responses={200: {"description": "Prometheus' text format 0.0.4."}},
)
async def metrics(service: ServiceOf) -> Response:
    """Counts and times; nothing of them names a film or a client."""
    return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def index() -> FileResponse:
    return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})


async def _receive(request: Request, limits: Limits) -> Upload:
    """Read a form with one film. Raises RequestError for everything else."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise MediaTypeError(
            f"The body is {kind or 'of no stated type'}. Send multipart/form-data with the film as {FIELD!r}."
        )
    async with _in_time(limits):
        form = await request.form(max_files=1, max_fields=0)
    film = form.get(FIELD)
    if not isinstance(film, UploadFile):
        raise RequestError(f"The form has no file named {FIELD!r}. Send the film under that name, with a file name.")
    name = plain_name(film.filename or "")
    said = (film.content_type or MEDIA_TYPES[-1]).partition(";")[0].strip().lower()
    if said not in MEDIA_TYPES:
        raise MediaTypeError(f"{name} is said to be {said}. Taken are {', '.join(MEDIA_TYPES)}.")
    if film.size is not None and film.size > limits.upload_bytes:
        raise TooLargeError(
            f"{name} has {film.size:,} bytes; at most {limits.upload_bytes:,} are taken. Send a single film."
        )
    return Upload(name, film.file)


@asynccontextmanager
async def _in_time(limits: Limits) -> AsyncIterator[None]:
    """Raises SlowUploadError where a body takes too long to arrive."""
    try:
        async with asyncio.timeout(limits.upload_seconds):
            yield
    except TimeoutError:
        raise SlowUploadError(
            f"The upload took more than {limits.upload_seconds:g} seconds. Send it over a faster connection."
        ) from None


def plain_name(name: str) -> str:
    """A client's file name without its path and what no name has; never empty, at most 120 characters."""
    base = PurePosixPath(name.replace("\\", "/")).name
    return "".join(letter for letter in base if letter.isprintable()).strip(". ")[-120:] or "film"


def _made(part: Part, result: Result) -> bytes | BinaryIO:
    """A part; a long one in a file without a name, so that it takes no memory while its client reads it or does not."""
    data = part.make(result)
    if len(data) <= BLOCK:
        return data
    with ExitStack() as stack:
        file = stack.enter_context(TemporaryFile())
        file.write(data)
        file.flush()
        stack.pop_all()
        return cast(BinaryIO, file)


async def _created(job: Job, service: Service, response: Response, wait: bool, location: str) -> Analysis:
    """location: relative to the request's address, as a proxy may serve the API from a subfolder."""
    response.headers["Location"] = location
    if not wait:
        return _analysis(job)
    await job.wait()
    if job.error is not None:
        service.jobs.delete(job)
        raise job.error.with_traceback(None)
    if job.status == "deleted":
        raise NotFoundError(f"{job.name} was removed before it was done.")
    response.status_code = 200
    return _analysis(job)


def _analysis(job: Job) -> Analysis:
    problem = None if job.error is None else Problem(code=job.error.code, message=str(job.error))
    return Analysis(id=job.key, name=job.name, status=job.status, stage=job.stage, error=problem, report=job.document)


async def _stream(job: Job) -> AsyncIterator[str]:
    async for step in job.events():
        if step is None:
            yield ": still there\n\n"
        else:
            name = step["status"] if step["status"] in FINISHED else "progress"
            yield f"event: {name}\ndata: {json.dumps(step)}\n\n"


async def _on_lungscope_error(request: Request, error: Exception) -> Response:
    return answer(cast(LungscopeError, error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Errors of the framework itself: no route, another method, a form that is none."""
    error = cast(HTTPException, error)
    path, status = request.url.path, error.status_code
    messages = {
        404: f"There is nothing at {path}. The page is at /, the API's description at /openapi.json.",
        405: f"{path} does not take {request.method}.",
    }
    codes = {404: NotFoundError.code, 405: "method"}
    message = messages.get(status, f"The request can not be read: {error.detail}")
    return JSONResponse(body(codes.get(status, RequestError.code), message), status, error.headers)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    found = cast(RequestValidationError, error).errors()
    if any(item["loc"][0] == "path" for item in found):
        return answer(NotFoundError(f"There is no analysis at {request.url.path}."))
    what = "; ".join(f"{' '.join(map(str, item['loc']))}: {item['msg']}" for item in found)
    return answer(RequestError(f"The request can not be read: {what}."))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody is there to read it."""
    return answer(RequestError("The client went away before its upload was whole."))


async def _on_unforeseen(request: Request, error: Exception) -> Response:
    message = f"The server failed in a way that nobody foresaw ({type(error).__name__}). Its log says where."
    return JSONResponse(body("internal", message), 500)
