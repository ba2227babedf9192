//! Bare quinn and bare noq, which still have one API: the same program over both.
//!
//! They get Backhaul's windows, socket buffers and largest packet, so that only the congestion
//! controller and what is above the transport differ. `default` leaves them as they come.

use std::net::{SocketAddr, UdpSocket};
use std::path::Path;

use rcgen::generate_simple_self_signed;
use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::Failure;

/// Chunks that are written at the same time, so that the link never waits for the next.
const LANES: usize = 64;
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const WINDOW_BYTES: u32 = 48 << 20;
const STREAMS_MAX: u32 = 256;
const SOCKET_BUFFER_BYTES: usize = 8 << 20;
const UDP_PAYLOAD_BYTES_MAX: u16 = 6500;

macro_rules! bare {
    ($module:ident, $quic:ident, $model:ident, $model_config:ident) => {
        pub(crate) mod $module {
            use std::net::SocketAddr;
            use std::path::Path;
            use std::sync::Arc;

            use $quic::congestion::{CubicConfig, $model_config};
            use $quic::{ClientConfig, Endpoint, EndpointConfig, ServerConfig, TokioRuntime};
            use $quic::{MtuDiscoveryConfig, TransportConfig, VarInt};

            use super::{
                LANES, STREAM_WINDOW_BYTES, STREAMS_MAX, UDP_PAYLOAD_BYTES_MAX, WINDOW_BYTES,
            };
            use crate::{CHUNK_BYTES, Failure, noise, ready};

            fn transport(method: &str) -> Result<TransportConfig, Failure> {
                let mut config = TransportConfig::default();
                match method {
                    "default" => return Ok(config),
                    "cubic" => {
                        config.congestion_controller_factory(Arc::new(CubicConfig::default()))
                    }
                    stringify!($model) => {
                        config.congestion_controller_factory(Arc::new($model_config::default()))
                    }
                    _ => return Err(crate::USAGE.into()),
                };
                config.stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES));
                config.receive_window(VarInt::from_u32(WINDOW_BYTES));
                config.send_window(WINDOW_BYTES.into());
                config.max_concurrent_uni_streams(VarInt::from_u32(STREAMS_MAX));
                let mut mtu = MtuDiscoveryConfig::default();
                mtu.upper_bound(UDP_PAYLOAD_BYTES_MAX);
                config.mtu_discovery_config(Some(mtu));
                Ok(config)
            }

            fn endpoint(
                address: SocketAddr,
                server: Option<ServerConfig>,
                method: &str,
            ) -> Result<Endpoint, Failure> {
                let mut config = EndpointConfig::default();
                if method != "default" {
                    config.max_udp_payload_size(UDP_PAYLOAD_BYTES_MAX)?;
                }
                let socket = super::socket(address, method)?;
                Ok(Endpoint::new(config, server, socket, Arc::new(TokioRuntime))?)
            }

            pub(crate) async fn receive(
                address: SocketAddr,
                keys: &Path,
                method: &str,
            ) -> Result<(), Failure> {
                let (certificate, key) = super::make_keys(keys)?;
                let mut config = ServerConfig::with_single_cert(vec![certificate], key)?;
                config.transport_config(Arc::new(transport(method)?));
                let endpoint = endpoint(address, Some(config), method)?;
                let count = ready();
                let incoming = endpoint.accept().await.ok_or("the endpoint is closed")?;
                let connection = incoming.await?;
                while let Ok(mut stream) = connection.accept_uni().await {
                    let count = count.clone();
                    tokio::spawn(async move {
                        let mut part = vec![0; CHUNK_BYTES];
                        while let Ok(Some(bytes)) = stream.read(&mut part).await {
                            count.add(bytes);
                        }
                    });
                }
                Ok(())
            }

            pub(crate) async fn send(
                address: SocketAddr,
                keys: &Path,
                method: &str,
            ) -> Result<(), Failure> {
                let roots = Arc::new(super::trusted(keys)?);
                let mut config = ClientConfig::with_root_certificates(roots)?;
                config.transport_config(Arc::new(transport(method)?));
                let any = (std::net::Ipv4Addr::UNSPECIFIED, 0).into();
                let endpoint = endpoint(any, None, method)?;
                let connection = endpoint.connect_with(config, address, super::NAME)?.await?;
                let data = noise()?;
                for _ in 0..LANES {
                    let (connection, data) = (connection.clone(), data.clone());
                    tokio::spawn(async move {
                        while let Ok(mut stream) = connection.open_uni().await {
                            if stream.write_chunk(data.clone()).await.is_err() {
                                break;
                            }
                            // It fails only for a stream that was stopped.
                            let _ = stream.finish();
                        }
                    });
                }
                Err(connection.closed().await.into())
            }
        }
    };
}

bare!(quinn, quinn, bbr, BbrConfig);
bare!(noq, noq, bbr3, Bbr3Config);

fn socket(address: SocketAddr, method: &str) -> Result<UdpSocket, Failure> {
    let socket = UdpSocket::bind(address)?;
    if method != "default" {
        set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES)?;
        set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES)?;
    }
    Ok(socket)
}

/// The name in the throw-away certificate.
pub(crate) const NAME: &str = "localhost";
const CERTIFICATE: &str = "certificate.der";

pub(crate) fn make_keys(
    keys: &Path,
) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), Failure> {
    let made = generate_simple_self_signed(vec![NAME.into()])?;
    std::fs::write(keys.join(CERTIFICATE), made.cert.der())?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    Ok((made.cert.der().clone(), key.into()))
}

pub(crate) fn trusted(keys: &Path) -> Result<rustls::RootCertStore, Failure> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(std::fs::read(keys.join(CERTIFICATE))?.into())?;
    Ok(roots)
}
