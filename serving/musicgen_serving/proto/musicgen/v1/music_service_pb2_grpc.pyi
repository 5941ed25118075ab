from collections.abc import Awaitable
from typing import Any

import grpc
import grpc.aio

from musicgen_serving.proto.musicgen.v1 import music_service_pb2 as pb

class MusicServiceStub:
    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None: ...
    Generate: grpc.UnaryUnaryMultiCallable[pb.GenerateRequest, pb.GenerateResponse]
    StreamGenerate: grpc.UnaryStreamMultiCallable[pb.StreamGenerateRequest, pb.StreamGenerateResponse]
    CancelGeneration: grpc.UnaryUnaryMultiCallable[pb.CancelGenerationRequest, pb.CancelGenerationResponse]
    GetGeneration: grpc.UnaryUnaryMultiCallable[pb.GetGenerationRequest, pb.GetGenerationResponse]
    ListModels: grpc.UnaryUnaryMultiCallable[pb.ListModelsRequest, pb.ListModelsResponse]

class MusicServiceServicer:
    def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Awaitable[pb.GenerateResponse]: ...
    def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Awaitable[None]: ...
    def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Awaitable[pb.CancelGenerationResponse]: ...
    def GetGeneration(
        self, request: pb.GetGenerationRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Awaitable[pb.GetGenerationResponse]: ...
    def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Awaitable[pb.ListModelsResponse]: ...

def add_MusicServiceServicer_to_server(servicer: MusicServiceServicer, server: grpc.Server | grpc.aio.Server) -> None: ...
