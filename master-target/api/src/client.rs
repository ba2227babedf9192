//! A client for the target's Unix socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;

use crate::{CommitRequest, FailoverRequest, Failure, Link, Machine, Point, Status};

/// Largest answer that is read: the views of 64 machines are far below it.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// How long an answer may take: whatever takes longer goes on in the target by itself, and requests
/// only start it. A tag waits for its point to cross the link.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);

/// Why a request came to nothing.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The socket cannot be reached.
    #[error(
        "the master target cannot be reached at {socket} ({source}); start it with `backhaul-master-target run`, or name its socket with --socket", socket = socket.display()
    )]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It does not answer.
    #[error(
        "the master target at {socket} does not answer within {} s; it may be stopped or overloaded, its log says more", ANSWER_TIME_MAX.as_secs(), socket = socket.display()
    )]
    Silent {
        /// The socket.
        socket: PathBuf,
    },
    /// The conversation broke.
    #[error("the master target's answer was lost: {0}")]
    Broken(String),
    /// The target refused.
    #[error("{}", .0.sentence)]
    Refused(Failure),
}

/// A client; each request uses a connection of its own.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the target that listens on `socket`.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// The target as a whole.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.send(Method::GET, "/v1/status", &()).await
    }

    /// Every machine.
    pub async fn machines(&self) -> Result<Vec<Machine>, ClientError> {
        self.send(Method::GET, "/v1/machines", &()).await
    }

    /// The links of all connected agents.
    pub async fn links(&self) -> Result<Vec<Link>, ClientError> {
        self.send(Method::GET, "/v1/links", &()).await
    }

    /// One machine.
    pub async fn machine(&self, name: &str) -> Result<Machine, ClientError> {
        self.send(Method::GET, &path(name, ""), &()).await
    }

    /// A machine's points.
    pub async fn points(&self, name: &str) -> Result<Vec<Point>, ClientError> {
        self.send(Method::GET, &path(name, "/points"), &()).await
    }

    /// Sets a point now, and waits until it is on stable storage here.
    pub async fn tag(&self, name: &str) -> Result<Point, ClientError> {
        self.send(Method::POST, &path(name, "/points"), &()).await
    }

    /// Begins a failover.
    pub async fn failover(
        &self,
        name: &str,
        request: &FailoverRequest,
    ) -> Result<Machine, ClientError> {
        self.send(Method::POST, &path(name, "/failover"), request).await
    }

    /// Begins to undo a failover.
    pub async fn cancel(&self, name: &str) -> Result<Machine, ClientError> {
        self.send(Method::POST, &path(name, "/cancel"), &()).await
    }

    /// Begins a commit.
    pub async fn commit(
        &self,
        name: &str,
        request: &CommitRequest,
    ) -> Result<Machine, ClientError> {
        self.send(Method::POST, &path(name, "/commit"), request).await
    }

    async fn send<Q: Serialize, A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        request: &Q,
    ) -> Result<A, ClientError> {
        let silent = |_| ClientError::Silent { socket: self.socket.clone() };
        let answer = self.converse(method, path, request);
        tokio::time::timeout(ANSWER_TIME_MAX, answer).await.map_err(silent)?
    }

    async fn converse<Q: Serialize, A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        request: &Q,
    ) -> Result<A, ClientError> {
        let unreachable = |source| ClientError::Unreachable { socket: self.socket.clone(), source };
        let broken = |error: &dyn std::fmt::Display| ClientError::Broken(error.to_string());
        let stream = UnixStream::connect(&self.socket).await.map_err(unreachable)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(&error))?;
        tokio::spawn(connection);
        let body = serde_json::to_vec(request).map_err(|error| broken(&error))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "backhaul")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| broken(&error))?;
        let answer = sender.send_request(request).await.map_err(|error| broken(&error))?;
        let good = answer.status().is_success();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| broken(&error))?
            .to_bytes();
        if good {
            return serde_json::from_slice(&body).map_err(|error| broken(&error));
        }
        let text = String::from_utf8_lossy(&body);
        let failure = serde_json::from_slice(&body).unwrap_or_else(|_| Failure {
            code: "other".into(),
            sentence: format!("the master target answered: {text}"),
        });
        Err(ClientError::Refused(failure))
    }
}

/// Machine names hold nothing that a URL would have to escape; what is not a name finds no machine.
fn path(name: &str, rest: &str) -> String {
    let safe: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '_' })
        .collect();
    format!("/v1/machines/{safe}{rest}")
}

#[cfg(test)]
mod tests {
    use super::{Client, ClientError};

    /// `backhaul machines` hung for ever on a target that somebody had stopped with a signal.
    #[tokio::test(start_paused = true)]
    async fn a_target_that_does_not_answer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let _listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let error = Client::new(&socket).machines().await.unwrap_err();
        assert!(matches!(error, ClientError::Silent { .. }), "{error}");
        assert!(error.to_string().contains("does not answer within 60 s"), "{error}");
    }
}
