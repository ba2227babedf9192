//! The REST interface, served on a Unix socket. The paths and types are those of `backhaul-api`.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path as FilePath;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use backhaul_api::{CommitRequest, FailoverRequest, Failure, Machine, Point};
use serde::Serialize;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use crate::target::{ApiRequest, MachineRequest};

type Requests = State<mpsc::Sender<ApiRequest>>;

/// Listens on the socket: its file belongs to the daemon's user, and nobody else may open it. A
/// socket that nobody answers on is replaced.
pub fn bind(socket: &FilePath) -> io::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Some(folder) = socket.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves the interface until the process ends.
pub async fn serve(listener: UnixListener, requests: mpsc::Sender<ApiRequest>) -> io::Result<()> {
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/links", get(links))
        .route("/v1/machines", get(machines))
        .route("/v1/machines/{name}", get(machine))
        .route("/v1/machines/{name}/points", get(points).post(tag))
        .route("/v1/machines/{name}/failover", post(failover))
        .route("/v1/machines/{name}/cancel", post(cancel))
        .route("/v1/machines/{name}/commit", post(commit))
        .with_state(requests);
    axum::serve(listener, router).await
}

async fn status(State(requests): Requests) -> Response {
    let (answer, answered) = oneshot::channel();
    let _ = requests.send(ApiRequest::Status(answer)).await;
    reply(answered.await.map_err(|_| stopping()))
}

async fn machines(State(requests): Requests) -> Response {
    let (answer, answered) = oneshot::channel();
    let _ = requests.send(ApiRequest::Machines(answer)).await;
    reply(answered.await.map_err(|_| stopping()))
}

async fn links(State(requests): Requests) -> Response {
    let (answer, answered) = oneshot::channel();
    let _ = requests.send(ApiRequest::Links(answer)).await;
    reply(answered.await.map_err(|_| stopping()))
}

async fn machine(State(requests): Requests, Path(name): Path<String>) -> Response {
    reply(ask(&requests, name, MachineRequest::Show).await)
}

async fn points(State(requests): Requests, Path(name): Path<String>) -> Response {
    let machine: Result<Machine, Failure> = ask(&requests, name, MachineRequest::Show).await;
    reply(machine.map(|machine| machine.points))
}

async fn tag(State(requests): Requests, Path(name): Path<String>) -> Response {
    reply::<Point>(ask(&requests, name, MachineRequest::Tag).await)
}

async fn failover(
    State(requests): Requests,
    Path(name): Path<String>,
    Json(request): Json<FailoverRequest>,
) -> Response {
    let with = |answer| MachineRequest::Failover(request, answer);
    reply(ask(&requests, name, with).await)
}

async fn cancel(State(requests): Requests, Path(name): Path<String>) -> Response {
    reply(ask(&requests, name, MachineRequest::Cancel).await)
}

async fn commit(
    State(requests): Requests,
    Path(name): Path<String>,
    Json(request): Json<CommitRequest>,
) -> Response {
    let with = |answer| MachineRequest::Commit(request, answer);
    reply(ask(&requests, name, with).await)
}

/// Asks the owner loop about one machine.
async fn ask<T>(
    requests: &mpsc::Sender<ApiRequest>,
    name: String,
    request: impl FnOnce(oneshot::Sender<Result<T, Failure>>) -> MachineRequest,
) -> Result<T, Failure> {
    let (answer, answered) = oneshot::channel();
    let _ = requests.send(ApiRequest::Machine(name, request(answer))).await;
    answered.await.unwrap_or_else(|_| Err(stopping()))
}

fn stopping() -> Failure {
    Failure { code: "stopping".into(), sentence: "the master target is stopping".into() }
}

fn reply<T: Serialize>(result: Result<T, Failure>) -> Response {
    match result {
        Ok(body) => Json(body).into_response(),
        Err(failure) => {
            let status = match failure.code.as_str() {
                "unknown-machine" | "unknown-point" => StatusCode::NOT_FOUND,
                "stopping" => StatusCode::SERVICE_UNAVAILABLE,
                _ => StatusCode::CONFLICT,
            };
            (status, Json(failure)).into_response()
        }
    }
}
