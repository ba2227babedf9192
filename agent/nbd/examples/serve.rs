//! Serves a file on a Unix socket until interrupted:
//! `cargo run -p backhaul-nbd --example serve -- FILE SOCKET`.

use std::path::Path;
use std::sync::Arc;

use backhaul_nbd::{Exports, FileExport, Listener, Server, ServerOptions};

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(file), Some(socket)) = (args.next(), args.next()) else {
        eprintln!("usage: serve FILE SOCKET");
        std::process::exit(2);
    };
    let exports = Exports::default();
    exports.insert("disk", Arc::new(FileExport::open(Path::new(&file), false)?));
    let listener = Listener::unix(Path::new(&socket))?;
    let server = Server::start(vec![listener], exports, ServerOptions::default());
    tokio::signal::ctrl_c().await?;
    server.stopped().await;
    Ok(())
}
