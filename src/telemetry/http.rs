//! HTTP server for scrapers: the part of HTTP/1.1 that they need, on a thread of its own, so that a slow
//! client cannot delay arpd.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::encoding::prometheus_text::CONTENT_TYPE;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use super::connections::{Connection, Connections, State};
use super::metrics::Gatherer;
use crate::datapath::pins::Store;
use crate::net::Netlink;

/// Maximum length of a request header in bytes.
const MAX_REQUEST: usize = 4096;
/// Timeout for a request to arrive.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout for sending an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for which an answer is cached.
const FRESH: Duration = Duration::from_secs(1);
/// Timeout of the lock on the pin directory.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause between attempts to bind; the address may not exist yet.
const BIND_PAUSE: Duration = Duration::from_secs(5);

/// Starts the server in the network namespace of the calling thread; it runs until the process ends. `hosts`
/// are host names to accept besides this host's own; `*` is any.
pub fn serve(store: &Store, address: SocketAddr, hosts: &[String]) -> io::Result<()> {
    let store = Store { lock_timeout: LOCK_TIMEOUT, ..store.clone() };
    let hosts = Hosts(hosts.to_vec());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let thread = std::thread::Builder::new().name("metrics".into());
    thread.spawn(move || runtime.block_on(answer_all(store, address, hosts))).map(drop)
}

async fn answer_all(store: Store, address: SocketAddr, hosts: Hosts) {
    let listener = bind(address).await;
    let exposition =
        Arc::new(Mutex::new(Exposition { gatherer: Gatherer::new(store), text: None }));
    let connections = Connections::default();
    let hosts = Arc::new(hosts);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok((stream, peer)) => (stream, peer.ip().to_canonical()),
            Err(error) => {
                log::debug!("metrics: {error}");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(connection) = connections.admit(peer) else { continue };
        let (exposition, hosts) = (Arc::clone(&exposition), Arc::clone(&hosts));
        tokio::spawn(async move {
            let result = tokio::select! {
                result = answer(stream, exposition, &hosts, &connection) => result,
                () = connection.closed() => Err(io::Error::other("closed for another connection")),
            };
            if let Err(error) = result {
                log::debug!("metrics: {error}");
            }
        });
    }
}

/// Host names that requests may be made to. Against DNS rebinding, by which a web page reads another site
/// under its own name; IP addresses are always accepted.
struct Hosts(Vec<String>);

impl Hosts {
    fn accept(&self, host: &str) -> bool {
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
            _ => host,
        };
        let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
        let is = |known: &str| known.eq_ignore_ascii_case(name.trim_end_matches('.'));
        address.unwrap_or(name).parse::<IpAddr>().is_ok()
            || is("localhost")
            || self.0.iter().any(|known| known == "*" || is(known))
            || rustix::system::uname()
                .nodename()
                .to_str()
                .is_ok_and(|own| !own.is_empty() && is(own))
    }
}

async fn bind(address: SocketAddr) -> TcpListener {
    let mut reported = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                log::info!("metrics at http://{address}/metrics");
                return listener;
            }
            Err(error) if !reported => {
                log::warn!("metrics at {address}: {error}; retrying every 5 s");
                reported = true;
            }
            Err(_) => {}
        }
        sleep(BIND_PAUSE).await;
    }
}

/// The cached metrics.
struct Exposition {
    gatherer: Gatherer,
    text: Option<Arc<String>>,
}

async fn metrics(exposition: Arc<Mutex<Exposition>>) -> anyhow::Result<Arc<String>> {
    let mut locked = exposition.lock().await;
    if let Some(text) = &locked.text {
        return Ok(Arc::clone(text));
    }
    // a new socket each time, so that a broken one is not reused
    let netlink = Netlink::open()?;
    let text = locked.gatherer.gather(&netlink).await;
    let text = Arc::new(text.map_err(|failure| anyhow::anyhow!("{failure}"))?);
    locked.text = Some(Arc::clone(&text));
    drop(locked);
    // return memory that glibc would keep until the next scrape
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

async fn answer(
    mut stream: TcpStream,
    exposition: Arc<Mutex<Exposition>>,
    hosts: &Hosts,
    connection: &Connection,
) -> io::Result<()> {
    let request = timeout(REQUEST_TIMEOUT, read_request(&mut stream)).await??;
    connection.set(State::Answering);
    const PLAIN: &str = "text/plain; charset=utf-8";
    let is_head = request.as_ref().is_ok_and(|request| request.is_head);
    let (state, kind, body): (_, _, Arc<String>) = match request {
        Err(state) => (state, PLAIN, format!("{state}\n").into()),
        Ok(Request { host: Some(host), .. }) if !hosts.accept(&host) => {
            let body = "this server has no such name; arpd --metrics-host gives it one\n";
            ("421 Misdirected Request", PLAIN, body.to_string().into())
        }
        Ok(request) => match request.path.as_str() {
            "/metrics" => match metrics(exposition).await {
                Ok(text) => ("200 OK", CONTENT_TYPE, text),
                Err(error) => ("503 Service Unavailable", PLAIN, format!("{error:#}\n").into()),
            },
            "/" => ("200 OK", PLAIN, "udplb: see /metrics\n".to_string().into()),
            _ => ("404 Not Found", PLAIN, "only /metrics is here\n".to_string().into()),
        },
    };
    connection.set(State::Writing(Instant::now()));
    let head = format!(
        "HTTP/1.1 {state}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
         Allow: GET, HEAD\r\nConnection: close\r\n\r\n",
        body.len()
    );
    timeout(ANSWER_TIMEOUT, async {
        stream.write_all(head.as_bytes()).await?;
        if !is_head {
            stream.write_all(body.as_bytes()).await?;
        }
        stream.shutdown().await
    })
    .await?
}

/// The parsed part of a request.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    is_head: bool,
    path: String,
    /// `None` with HTTP/1.0.
    host: Option<String>,
}

/// Reads a request, or returns the status line of its refusal.
async fn read_request(stream: &mut TcpStream) -> io::Result<Result<Request, &'static str>> {
    let mut request = Vec::with_capacity(512);
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() >= MAX_REQUEST {
            return Ok(Err("431 Request Header Fields Too Large"));
        }
        if stream.read_buf(&mut request).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(parse_request(&String::from_utf8_lossy(&request)))
}

fn parse_request(text: &str) -> Result<Request, &'static str> {
    const BAD: &str = "400 Bad Request";
    let mut lines = text.split("\r\n");
    let words: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    let [method, target, version] = words[..] else { return Err(BAD) };
    if !version.starts_with("HTTP/1.") {
        return Err(BAD);
    }
    let mut hosts = lines.filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("host").then(|| value.trim().to_string())
    });
    let host = hosts.next();
    if hosts.next().is_some() || (host.is_none() && version != "HTTP/1.0") {
        return Err(BAD);
    }
    if !matches!(method, "GET" | "HEAD") {
        return Err("405 Method Not Allowed");
    }
    let path = target.split('?').next().unwrap_or_default().to_string();
    Ok(Request { is_head: method == "HEAD", path, host })
}

#[cfg(test)]
mod tests {
    use super::{Hosts, parse_request};

    #[test]
    fn requests() {
        let parse = |text: &str| {
            parse_request(text).map(|request| (request.is_head, request.path, request.host))
        };
        let get = parse("GET /metrics?x=1 HTTP/1.1\r\nhOsT:  relay:9477 \r\n\r\n");
        assert_eq!(get, Ok((false, "/metrics".into(), Some("relay:9477".into()))));
        assert_eq!(parse("HEAD / HTTP/1.0\r\n\r\n"), Ok((true, "/".into(), None)));
        assert_eq!(parse("PUT / HTTP/1.0\r\n\r\n"), Err("405 Method Not Allowed"));
        for bad in [
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            "GET / HTTP/2\r\nHost: a\r\n\r\n",
            "GET\r\n\r\n",
            "\r\n\r\n",
        ] {
            assert_eq!(parse(bad), Err("400 Bad Request"), "{bad:?}");
        }
    }

    #[test]
    fn hosts() {
        let none = Hosts(Vec::new());
        for own in ["127.0.0.1", "10.0.0.1:9477", "[::1]", "[2001:db8::1]:9477", "LOCALHOST:1"] {
            assert!(none.accept(own), "{own}");
        }
        for other in ["evil.example", "evil.example:9477", "127.0.0.1.evil.example", "", "a:b"] {
            assert!(!none.accept(other), "{other}");
        }
        let uname = rustix::system::uname();
        let own = uname.nodename().to_str().expect("a name");
        assert!(none.accept(&format!("{own}:9477")));
        let named = Hosts(vec!["relay.example.net".into()]);
        assert!(named.accept("Relay.Example.NET.:9477") && !named.accept("example.net"));
        assert!(Hosts(vec!["*".into()]).accept("evil.example"));
    }
}
