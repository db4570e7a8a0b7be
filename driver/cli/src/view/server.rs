//! The page, and the way from it to the machines: a WebSocket carries what a viewer and a machine say to each other.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use firn::viewers;
use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use tokio::task::spawn_blocking;

/// How much of a machine's answer is passed on at once, in bytes.
const CHUNK: usize = 64 << 10;
/// The longest message from a viewer, in bytes; keys and pointer moves are much shorter.
const MAX_MESSAGE: usize = 64 << 10;

/// The page loads nothing from elsewhere.
const POLICY: &str =
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'";

const PAGE: &str = include_str!("page.html");

struct PageState {
    dir: PathBuf,
    token: String,
}

#[derive(Deserialize)]
struct Secret {
    #[serde(default)]
    token: String,
}

#[derive(Deserialize)]
struct Which {
    machine: String,
}

/// A random secret.
pub(super) fn token() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).context("cannot make a secret")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Serves the page and the machines of `dir` until it fails.
pub(super) async fn serve(listener: TcpListener, dir: PathBuf, token: String) -> Result<()> {
    let site = Arc::new(PageState { dir, token });
    let routes = Router::new()
        .route("/", get(Html(PAGE)))
        .route("/machines", get(machines))
        .route("/screen", get(screen))
        .layer(middleware::from_fn_with_state(Arc::clone(&site), guard))
        .with_state(site);
    axum::serve(listener, routes).await.context("cannot serve the page")
}

/// Admits only requests with the secret.
async fn guard(
    State(site): State<Arc<PageState>>,
    Query(secret): Query<Secret>,
    request: Request,
    next: Next,
) -> Response {
    if secret.token != site.token {
        let what = "wrong token: open the address that `firn view` has printed\n";
        return (StatusCode::FORBIDDEN, what).into_response();
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    // The address must not reach others.
    headers.insert(header::REFERRER_POLICY, header::HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    headers.insert(header::CONTENT_SECURITY_POLICY, header::HeaderValue::from_static(POLICY));
    response
}

/// The machines running now.
async fn find(site: &PageState) -> io::Result<Vec<viewers::Found>> {
    let dir = site.dir.clone();
    spawn_blocking(move || viewers::find(&dir)).await.map_err(io::Error::other)?
}

async fn machines(State(site): State<Arc<PageState>>) -> Result<Json<Vec<String>>, Failure> {
    let machines = find(&site).await?;
    Ok(Json(machines.iter().map(viewers::Found::id).collect()))
}

async fn screen(
    State(site): State<Arc<PageState>>,
    Query(which): Query<Which>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, Failure> {
    let machines = find(&site).await?;
    let Some(machine) = machines.into_iter().find(|machine| machine.id() == which.machine) else {
        return Err(Failure(
            StatusCode::NOT_FOUND,
            format!("there is no machine {}\n", which.machine),
        ));
    };
    let stream = UnixStream::from_std(machine.connect()?)?;
    Ok(upgrade.max_message_size(MAX_MESSAGE).on_upgrade(|socket| pass(socket, stream)))
}

/// Passes bytes on in both directions until one side ends.
async fn pass(socket: WebSocket, machine: UnixStream) {
    let (mut to_viewer, mut from_viewer) = socket.split();
    let (mut from_machine, mut to_machine) = machine.into_split();
    let down = async {
        let mut bytes = vec![0; CHUNK];
        while let Ok(read @ 1..) = from_machine.read(&mut bytes).await {
            let part = Message::Binary(bytes[..read].to_vec().into());
            if to_viewer.send(part).await.is_err() {
                return;
            }
        }
    };
    let up = async {
        while let Some(Ok(message)) = from_viewer.next().await {
            if let Message::Binary(bytes) = message
                && to_machine.write_all(&bytes).await.is_err()
            {
                return;
            }
        }
    };
    tokio::select! {
        () = down => {}
        () = up => {}
    }
}

struct Failure(StatusCode, String);

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, self.1).into_response()
    }
}
