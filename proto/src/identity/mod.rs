//! Who speaks: certificates of the site's own CA, with the role and the name inside.
//!
//! A certificate names its holder by a URI, `backhaul://agent/NAME` or `backhaul://target/NAME`,
//! not by a host name: operators move targets between addresses, and an agent's certificate must
//! never pass for a target's.

mod pki;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use thiserror::Error;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use crate::id::PeerName;
use crate::version::ALPN;

pub use pki::{PkiError, create_ca, issue};

/// What a certificate's holder may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// May connect to a target and replicate the machines enrolled to it.
    Agent,
    /// May accept agents.
    Target,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Agent => "agent",
            Self::Target => "target",
        })
    }
}

/// Where an identity lies.
#[derive(Debug, Clone)]
pub struct IdentityFiles {
    /// The site's CA certificate.
    pub ca: PathBuf,
    /// This end's certificate.
    pub cert: PathBuf,
    /// This end's private key.
    pub key: PathBuf,
}

impl IdentityFiles {
    /// Why each of the files that cannot be read cannot be.
    pub fn unreadable(&self) -> Vec<IdentityError> {
        [&self.ca, &self.cert, &self.key].into_iter().filter_map(|path| read(path).err()).collect()
    }
}

/// Why an identity cannot be used.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// A file cannot be read.
    #[error("{path} cannot be read: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} holds no {expected} in PEM form", path = path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        expected: &'static str,
    },
    /// The certificate is not one of ours.
    #[error(
        "{path} is not a Backhaul certificate: it lacks a `backhaul://agent/NAME` or `backhaul://target/NAME` URI; issue one with `backhaul-master-target pki issue`", path = path.display()
    )]
    NotOurs {
        /// The file.
        path: PathBuf,
    },
    /// The certificate is for the other end.
    #[error("{path} is the certificate of {found} `{name}`, but this is to run as {expected}", path = path.display())]
    Role {
        /// The file.
        path: PathBuf,
        /// What it is for.
        found: Role,
        /// Whose it is.
        name: PeerName,
        /// What is needed.
        expected: Role,
    },
    /// Key and certificate do not belong together, or the library refuses them.
    #[error("{path} and its key cannot be used together: {source}", path = path.display())]
    Refused {
        /// The certificate's file.
        path: PathBuf,
        /// What rustls said.
        source: rustls::Error,
    },
}

/// A loaded identity.
pub struct Identity {
    role: Role,
    name: PeerName,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    cert_path: PathBuf,
    ca_path: PathBuf,
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    fs::read(path).map_err(|source| IdentityError::Read { path: path.to_owned(), source })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let pem = read(path)?;
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match parsed {
        Ok(list) if !list.is_empty() => Ok(list),
        _ => Err(IdentityError::Pem { path: path.to_owned(), expected: "certificate" }),
    }
}

/// The ciphers of TLS 1.3, AES-128-GCM first: encryption is the largest part of what a fast link takes
/// of the processors, and ten rounds take a quarter less than the fourteen of AES-256.
fn provider() -> CryptoProvider {
    use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};
    let cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    CryptoProvider { cipher_suites, ..default_provider() }
}

impl Identity {
    /// Loads the identity of an end that is to run as `role`.
    pub fn load(files: &IdentityFiles, role: Role) -> Result<Self, IdentityError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&files.ca)? {
            let bad = |_| IdentityError::Pem { path: files.ca.clone(), expected: "certificate" };
            roots.add(certificate).map_err(bad)?;
        }
        let chain = certificates(&files.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&read(&files.key)?)
            .map_err(|_| IdentityError::Pem { path: files.key.clone(), expected: "private key" })?;
        let (found, name) =
            holder(&chain[0]).ok_or_else(|| IdentityError::NotOurs { path: files.cert.clone() })?;
        if found != role {
            let path = files.cert.clone();
            return Err(IdentityError::Role { path, found, name, expected: role });
        }
        let identity = Self {
            role,
            name,
            chain,
            key,
            roots: Arc::new(roots),
            provider: Arc::new(provider()),
            cert_path: files.cert.clone(),
            ca_path: files.ca.clone(),
        };
        // Building a configuration is what checks that the key fits the certificate.
        match role {
            Role::Agent => identity.client_config(None).map(|_| ())?,
            Role::Target => identity.server_config().map(|_| ())?,
        }
        Ok(identity)
    }

    /// The name in the certificate.
    pub fn name(&self) -> &PeerName {
        &self.name
    }

    /// The role in the certificate.
    pub fn role(&self) -> Role {
        self.role
    }

    /// A secret of this identity for stateless resets, derived from its private key.
    pub(crate) fn reset_secret(&self) -> [u8; 32] {
        blake3::derive_key("backhaul 2026 quic stateless reset", self.key.secret_der())
    }

    fn refused(&self, source: rustls::Error) -> IdentityError {
        IdentityError::Refused { path: self.cert_path.clone(), source }
    }

    /// TLS 1.3 for a target. No tickets: a resumed session would keep a certificate that has been
    /// replaced or has run out.
    pub(crate) fn server_config(&self) -> Result<rustls::ServerConfig, IdentityError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(
            Arc::clone(&self.roots),
            Arc::clone(&self.provider),
        )
        .build()
        .map_err(|error| self.refused(rustls::Error::General(error.to_string())))?;
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| self.refused(error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| self.refused(error))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(config)
    }

    /// TLS 1.3 for an agent that expects a target, of a given name or of any.
    pub(crate) fn client_config(
        &self,
        expected: Option<PeerName>,
    ) -> Result<rustls::ClientConfig, IdentityError> {
        let verifier = TargetVerifier {
            roots: Arc::clone(&self.roots),
            ca_path: self.ca_path.clone(),
            algorithms: self.provider.signature_verification_algorithms,
            expected,
        };
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| self.refused(error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| self.refused(error))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }
}

/// The role and name in a certificate, if it is one of ours.
pub(crate) fn holder(certificate: &CertificateDer<'_>) -> Option<(Role, PeerName)> {
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    let names = parsed.subject_alternative_name().ok()??;
    names.value.general_names.iter().find_map(|name| {
        let GeneralName::URI(uri) = name else { return None };
        let rest = uri.strip_prefix("backhaul://")?;
        let (role, name) = rest.split_once('/')?;
        let role = match role {
            "agent" => Role::Agent,
            "target" => Role::Target,
            _ => return None,
        };
        Some((role, name.parse().ok()?))
    })
}

/// Accepts a server that the site's CA says is a target, whatever its address.
#[derive(Debug)]
struct TargetVerifier {
    roots: Arc<RootCertStore>,
    /// Where they were read from, for messages.
    ca_path: PathBuf,
    algorithms: WebPkiSupportedAlgorithms,
    expected: Option<PeerName>,
}

impl TargetVerifier {
    /// What rustls calls an unknown issuer, or a bad signature where two sites' CAs have one name, is a
    /// mistake in a configuration nearly always.
    fn explain(&self, error: rustls::Error) -> rustls::Error {
        match error {
            rustls::Error::InvalidCertificate(
                CertificateError::UnknownIssuer | CertificateError::BadSignature,
            ) => rustls::Error::General(format!(
                "its certificate was not issued by the CA in {}; give both ends certificates of one CA, and `identity.ca` that CA's",
                self.ca_path.display()
            )),
            other => other,
        }
    }
}

/// What went wrong with a certificate, without rustls's own words before ours.
pub(crate) fn certificate_reason(reason: &str) -> String {
    reason.strip_prefix("unexpected error: ").unwrap_or(reason).to_owned()
}

impl ServerCertVerifier for TargetVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )
        .map_err(|error| self.explain(error))?;
        let refuse = |text: String| Err(rustls::Error::General(text));
        match (holder(end_entity), &self.expected) {
            (Some((Role::Target, name)), Some(expected)) if name != *expected => {
                refuse(format!("it is target `{name}`, but `{expected}` is expected"))
            }
            (Some((Role::Target, _)), _) => Ok(ServerCertVerified::assertion()),
            (Some((Role::Agent, name)), _) => {
                refuse(format!("it shows the certificate of agent `{name}`, not of a target"))
            }
            (None, _) => refuse("its certificate is not a Backhaul one".into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// How long a certificate has left, for a warning before it runs out.
impl Identity {
    /// Time until this end's certificate expires; zero when it has.
    pub fn expires_in(&self) -> Duration {
        let Ok((_, parsed)) = x509_parser::certificate::X509Certificate::from_der(&self.chain[0])
        else {
            return Duration::ZERO;
        };
        let left = parsed.validity().time_to_expiration();
        left.map_or(Duration::ZERO, |left| Duration::from_secs(left.whole_seconds().max(0) as u64))
    }
}
