//! Answers scrapers: as much of HTTP/1.1 as they need, on a thread of its own, so that nothing that
//! they do or leave undone holds up who started it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::prometheus_text::CONTENT_TYPE;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{sleep, timeout};

use super::Gatherer;
use crate::cli::Global;
use crate::netlink::Netlink;

/// At once; further ones are closed.
const CONNECTIONS: usize = 16;
/// Bytes of a request, its body left out.
const REQUEST: usize = 4096;
/// For a request to arrive.
const REQUEST_PATIENCE: Duration = Duration::from_secs(2);
/// For an answer to be taken.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// How old an answer may be that is given again.
const FRESH: Duration = Duration::from_secs(1);
/// How long an apply is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
/// Until the address is tried again: it may not be there yet.
const BIND_PAUSE: Duration = Duration::from_secs(5);

/// Starts to answer, in the network namespace of the calling thread, until the process ends.
pub fn serve(global: &Global, address: SocketAddr) -> io::Result<()> {
    let global = Global { lock_timeout: LOCK_PATIENCE, ..global.clone() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let thread = std::thread::Builder::new().name("metrics".into());
    thread.spawn(move || runtime.block_on(answer_all(global, address))).map(drop)
}

async fn answer_all(global: Global, address: SocketAddr) {
    let listener = bind(address).await;
    let exposition =
        Arc::new(Mutex::new(Exposition { gatherer: Gatherer::new(global), text: None }));
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                log::debug!("metrics: {error}");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else { continue };
        let exposition = Arc::clone(&exposition);
        tokio::spawn(async move {
            if let Err(error) = answer(stream, exposition).await {
                log::debug!("metrics: {error}");
            }
            drop(permit);
        });
    }
}

async fn bind(address: SocketAddr) -> TcpListener {
    let mut told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                log::info!("metrics at http://{address}/metrics");
                return listener;
            }
            Err(error) if !told => {
                log::warn!("metrics at {address}: {error}; it is tried again and again");
                told = true;
            }
            Err(_) => {}
        }
        sleep(BIND_PAUSE).await;
    }
}

/// All metrics, gathered once for those who ask within a short time.
struct Exposition {
    gatherer: Gatherer,
    text: Option<Arc<String>>,
}

async fn metrics(exposition: Arc<Mutex<Exposition>>) -> anyhow::Result<Arc<String>> {
    let mut locked = exposition.lock().await;
    if let Some(text) = &locked.text {
        return Ok(Arc::clone(text));
    }
    // a socket for each: one that has broken is not kept
    let netlink = Netlink::open()?;
    let text = locked.gatherer.gather(&netlink).await;
    let text = Arc::new(text.map_err(|failure| anyhow::anyhow!("{failure}"))?);
    locked.text = Some(Arc::clone(&text));
    drop(locked);
    // glibc would keep what it took until the next scrape
    // SAFETY: takes a plain number.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
    tokio::spawn(async move {
        sleep(FRESH).await;
        exposition.lock().await.text = None;
    });
    Ok(text)
}

async fn answer(mut stream: TcpStream, exposition: Arc<Mutex<Exposition>>) -> io::Result<()> {
    let path = timeout(REQUEST_PATIENCE, read_path(&mut stream)).await??;
    const PLAIN: &str = "text/plain; charset=utf-8";
    let (state, kind, body): (_, _, Arc<String>) = match path {
        Err(state) => (state, PLAIN, format!("{state}\n").into()),
        Ok(path) if path == "/metrics" => match metrics(exposition).await {
            Ok(text) => ("200 OK", CONTENT_TYPE, text),
            Err(error) => ("503 Service Unavailable", PLAIN, format!("{error:#}\n").into()),
        },
        Ok(path) if path == "/" => ("200 OK", PLAIN, "udplb: see /metrics\n".to_string().into()),
        Ok(_) => ("404 Not Found", PLAIN, "only /metrics is here\n".to_string().into()),
    };
    let head = format!(
        "HTTP/1.1 {state}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
         Allow: GET\r\nConnection: close\r\n\r\n",
        body.len()
    );
    timeout(ANSWER_PATIENCE, async {
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body.as_bytes()).await?;
        stream.shutdown().await
    })
    .await?
}

/// The path of a request, or how it is refused.
async fn read_path(stream: &mut TcpStream) -> io::Result<Result<String, &'static str>> {
    let mut request = Vec::with_capacity(512);
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() >= REQUEST {
            return Ok(Err("431 Request Header Fields Too Large"));
        }
        if stream.read_buf(&mut request).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let words: Vec<&str> = line.split(' ').collect();
    Ok(match words[..] {
        ["GET", target, version] if version.starts_with("HTTP/1.") => {
            Ok(target.split('?').next().unwrap_or_default().to_string())
        }
        [_, _, version] if version.starts_with("HTTP/1.") => Err("405 Method Not Allowed"),
        _ => Err("400 Bad Request"),
    })
}
