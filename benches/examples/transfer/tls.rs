//! One TCP connection with TLS 1.3 by rustls.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::bare::{NAME, make_keys, trusted};
use crate::{CHUNK_BYTES, Failure, noise, ready};

pub(crate) async fn receive(address: SocketAddr, keys: &Path) -> Result<(), Failure> {
    let (certificate, key) = make_keys(keys)?;
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    let listener = TcpListener::bind(address).await?;
    let count = ready();
    let (stream, _) = listener.accept().await?;
    let mut stream = TlsAcceptor::from(Arc::new(config)).accept(stream).await?;
    let mut part = vec![0; CHUNK_BYTES];
    loop {
        match stream.read(&mut part).await? {
            0 => return Ok(()),
            bytes => count.add(bytes),
        }
    }
}

pub(crate) async fn send(address: SocketAddr, keys: &Path) -> Result<(), Failure> {
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(trusted(keys)?)
        .with_no_client_auth();
    let stream = TcpStream::connect(address).await?;
    let connector = TlsConnector::from(Arc::new(config));
    let mut stream = connector.connect(NAME.try_into()?, stream).await?;
    let data = noise()?;
    loop {
        stream.write_all(&data).await?;
    }
}
