//! Making the site's CA and issuing identities, for labs and for sites without a PKI of their own.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use thiserror::Error;

use crate::id::PeerName;
use crate::identity::Role;

/// Days that a CA made here is valid: it outlives several generations of certificates.
const CA_DAYS: u32 = 3650;

/// A clock that is this much behind still accepts a certificate made just now.
const CLOCK_SLACK: Duration = Duration::from_secs(3600);

/// Why a CA or a certificate could not be made.
#[derive(Debug, Error)]
pub enum PkiError {
    /// A file is there already.
    #[error("{path} exists already; move it away first, nothing is overwritten", path = path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The CA in the folder cannot sign.
    #[error("the CA in {path} cannot be used: {source}", path = path.display())]
    Ca {
        /// The folder.
        path: PathBuf,
        /// What the library said.
        source: rcgen::Error,
    },
}

/// Makes `ca.pem` and `ca.key` in `dir`. The key file is readable by its owner only.
pub fn create_ca(dir: &Path) -> Result<(), PkiError> {
    let wrong = |source| PkiError::Ca { path: dir.to_owned(), source };
    fs::create_dir_all(dir).map_err(|source| PkiError::Io { path: dir.to_owned(), source })?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Backhaul site CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity(&mut params, CA_DAYS);
    let key = KeyPair::generate().map_err(wrong)?;
    let certificate = params.self_signed(&key).map_err(wrong)?;
    write_new(&dir.join("ca.key"), key.serialize_pem().as_bytes(), 0o600)?;
    write_new(&dir.join("ca.pem"), certificate.pem().as_bytes(), 0o644)
}

/// Issues `NAME.pem` and `NAME.key` in `dir`, signed by the CA there, valid for `days`.
pub fn issue(dir: &Path, role: Role, name: &PeerName, days: u32) -> Result<(), PkiError> {
    let wrong = |source| PkiError::Ca { path: dir.to_owned(), source };
    let read = |file: &str| {
        let path = dir.join(file);
        fs::read_to_string(&path).map_err(|source| PkiError::Io { path, source })
    };
    let ca_key = KeyPair::from_pem(&read("ca.key")?).map_err(wrong)?;
    let ca = Issuer::from_ca_cert_pem(&read("ca.pem")?, ca_key).map_err(wrong)?;

    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name.as_str());
    let uri = Ia5String::try_from(format!("backhaul://{role}/{name}")).map_err(wrong)?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![match role {
        Role::Agent => ExtendedKeyUsagePurpose::ClientAuth,
        Role::Target => ExtendedKeyUsagePurpose::ServerAuth,
    }];
    validity(&mut params, days);
    let key = KeyPair::generate().map_err(wrong)?;
    let certificate = params.signed_by(&key, &ca).map_err(wrong)?;
    write_new(&dir.join(format!("{name}.key")), key.serialize_pem().as_bytes(), 0o600)?;
    write_new(&dir.join(format!("{name}.pem")), certificate.pem().as_bytes(), 0o644)
}

fn validity(params: &mut CertificateParams, days: u32) {
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SLACK).into();
    params.not_after = (now + Duration::from_secs(u64::from(days) * 86_400)).into();
}

fn write_new(path: &Path, content: &[u8], mode: u32) -> Result<(), PkiError> {
    let mut options = fs::OpenOptions::new();
    let opened = options.write(true).create_new(true).mode(mode).open(path);
    let result = opened.and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    result.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => PkiError::Exists { path: path.to_owned() },
        _ => PkiError::Io { path: path.to_owned(), source },
    })
}
