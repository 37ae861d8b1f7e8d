"""The HTTP application: the routes of the API, and the page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.routing import Route
from starlette.types import ASGIApp

import d2llm
from d2llm.errors import ArgumentError

from .answers import (
    Ranked,
    by_hits,
    by_score,
    cohere_ranking,
    openai_json,
    search_answer,
    tei_ranking,
    vectors_json,
)
from .door import Door
from .judgements import Judgements, judgements_router
from .mcp import McpEndpoint
from .metrics import Metrics
from .problems import NotReady, handle_problems
from .schemas import (
    AddAnswer,
    CohereAnswer,
    DeleteAnswer,
    DeleteBody,
    DocumentsBody,
    EmbedBody,
    ErrorAnswer,
    OpenAIEmbedAnswer,
    OpenAIEmbedBody,
    RankedText,
    RerankBody,
    SearchAnswer,
    SearchBody,
    SearchesAnswer,
)
from .service import Service
from .settings import Settings

PAGE = Path(__file__).parent / "page"
api = APIRouter(responses={"4XX": {"model": ErrorAnswer}, "503": {"model": ErrorAnswer}})


class Serving:
    """The application `app` and what it serves, which is loaded later: set `service` then."""

    def __init__(self, settings: Settings | None = None, *, judgements: Judgements | None = None) -> None:
        """`judgements` are where those of the page are kept. None: the page keeps its own, in the browser."""
        self.settings, self.metrics = settings or Settings(), Metrics()
        self.service: Service | None = None
        mcp = McpEndpoint(self.ready, self.settings.cors)
        inner = FastAPI(
            title="d2llm",
            lifespan=mcp.running,
            version=d2llm.__version__,
            docs_url=None,  # these pages load scripts from another host
            redoc_url=None,
            # For the description alone: the door checks the keys, before it reads a body.
            dependencies=[Depends(HTTPBearer(auto_error=False, description="A key of the service, if it has any."))],
        )
        inner.state.serving = self
        handle_problems(inner)
        routers = api, judgements_router(judgements)
        for router in routers:
            inner.include_router(router)
        inner.router.routes.append(Route(mcp.PATH, mcp))
        inner.router.routes.append(Route("/favicon.ico", _icon))  # asked for beside whatever a browser opens
        paths = frozenset(route.path for router in routers for route in router.routes if isinstance(route, APIRoute))
        # Not mounted: a mount takes each address, also that of a route which takes another method.
        inner.router.default = StaticFiles(directory=PAGE, html=True)
        self.door = Door(inner, self.settings, self.metrics, paths | {mcp.PATH})
        self.app: ASGIApp = self.door
        if self.settings.cors:  # outside of the door: browsers ask without a key what they may do
            self.app = CORSMiddleware(
                self.app,
                allow_origins=self.settings.cors,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["X-Request-ID", "Retry-After"],
            )

    def ready(self) -> Service:
        """Return the service, or raise `NotReady`."""
        if self.service is None:
            raise NotReady("the model is not loaded yet: try again soon")
        return self.service


async def _icon(_: Request) -> Response:
    return FileResponse(PAGE / "icon.svg")


def _service(request: Request) -> Service:
    service: Service = request.app.state.serving.ready()
    return service


Loaded = Annotated[Service, Depends(_service)]


def log(request: Request, content: Any = None, /, **facts: Any) -> None:
    """Add facts to the line of the log about this request. Texts are added only if the service logs them."""
    request.state.log |= facts
    if request.app.state.serving.settings.log_texts and content is not None:
        request.state.log["content"] = content


@api.post("/search", response_model=SearchAnswer | SearchesAnswer)
async def search(body: SearchBody, request: Request, service: Loaded) -> Response:
    """Search for one query or several: recall candidates, then rescore them."""
    queries = body.texts()
    log(request, queries, queries=len(queries))
    found = await service.search(queries, body.options(), reasons=body.explain)
    vain = any(not explanation.hits for explanation in found)
    why = await run_in_threadpool(service.why_nothing, body.filter) if vain else []
    answers = [search_answer(explanation, [] if explanation.hits else why) for explanation in found]
    return JSONResponse(answers[0] if body.queries is None else {"results": answers})


def _require_width(dimensions: int | None, service: Service) -> None:
    if dimensions not in (None, width := service.model.config.embedding_dim):
        raise ArgumentError(f"this model has vectors of {width} dimensions, not of {dimensions}: leave dimensions out")


@api.post("/embed", response_model=list[list[float]])
async def embed(body: EmbedBody, request: Request, service: Loaded) -> Response:
    """Encode texts, as text-embeddings-inference does."""
    log(request, body.texts, texts=len(body.texts), side=body.side)
    _require_width(body.dimensions, service)
    vectors = await service.embed(body.texts, body.side, truncate=body.truncate is not False)
    return Response(await run_in_threadpool(vectors_json, vectors), media_type="application/json")


@api.post("/v1/embeddings", response_model=OpenAIEmbedAnswer)
async def openai_embed(body: OpenAIEmbedBody, request: Request, service: Loaded) -> Response:
    """Encode texts, as OpenAI does."""
    log(request, body.texts, texts=len(body.texts), side=body.side)
    _require_width(body.dimensions, service)
    vectors = await service.embed(body.texts, body.side)
    answer = await run_in_threadpool(openai_json, vectors, body.model or service.name, body.encoding_format)
    return Response(answer, media_type="application/json")


@api.post("/rerank", response_model=list[RankedText] | CohereAnswer)
async def rerank(body: RerankBody, request: Request, service: Loaded) -> Response:
    """Rank texts or stored documents, as text-embeddings-inference does. With `documents`, as Cohere does."""
    ranked = await _ranked(body, request, service)
    if body.documents is None:
        return JSONResponse(tei_ranking(ranked, body))
    return JSONResponse(cohere_ranking(ranked, body, request.state.id))


@api.post("/v1/rerank", response_model=CohereAnswer)
@api.post("/v2/rerank", response_model=CohereAnswer)
async def cohere_rerank(body: RerankBody, request: Request, service: Loaded) -> Response:
    """Rank texts or stored documents for a query, as Cohere does."""
    return JSONResponse(cohere_ranking(await _ranked(body, request, service), body, request.state.id))


async def _ranked(body: RerankBody, request: Request, service: Service) -> list[Ranked]:
    if body.ids is not None:
        log(request, [body.query], ids=len(body.ids))
        return by_hits(body.ids, await service.rerank_stored(body.query, body.ids, task=body.task))
    texts = body.all_texts
    log(request, [body.query, *texts], texts=len(texts))
    scores = await service.rerank(body.query, texts, task=body.task, truncate=body.truncate is not False)
    return by_score(texts, scores)


@api.post("/documents", response_model=AddAnswer)
async def add(body: DocumentsBody, request: Request, service: Loaded) -> Response:
    """Store documents; those with the same id are replaced. They are on the disk when this answers."""
    log(request, body.documents, documents=len(body.documents))
    report = asdict(await service.add(body.documents, chunk=body.chunk))
    return JSONResponse({name: report[name] for name in AddAnswer.model_fields})


@api.delete("/documents")
async def delete(body: DeleteBody, request: Request, service: Loaded) -> DeleteAnswer:
    """Remove documents. Ids that are not stored are ignored."""
    log(request, documents=len(body.ids))
    return DeleteAnswer(deleted=await service.delete(body.ids))


@api.get("/health", responses={200: {"content": {"application/json": {"example": {"status": "ready"}}}}})
async def health(service: Loaded) -> dict[str, str]:
    """Whether the model is loaded: 200, and 503 before."""
    return {"status": "ready"}


@api.get("/info")
async def info(service: Loaded) -> dict[str, Any]:
    """Facts about the model, the collection and the limits."""
    return await run_in_threadpool(service.info)


@api.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """What the service measures, in Prometheus' text format."""
    return Response(request.app.state.serving.metrics.text(), media_type=CONTENT_TYPE_LATEST)
