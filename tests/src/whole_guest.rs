//! A whole guest: Debian's kernel in an emulated machine, whose disk holds everything else.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, bail, ensure};
use backhaul_lab::tool::Tool;

/// Longest that a guest may run; emulated, on a busy machine, it takes ten seconds.
const RUN_SECONDS_MAX: u32 = 180;

/// What the kernel needs for a disk of ext4 behind virtio, where it is not built in.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"];

const QEMU: Tool = Tool { program: "qemu-system-x86_64", package: "qemu-system-x86" };

/// Mounts the disk and goes on from there.
const INITRAMFS_INIT: &str = "#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox ls /modules); do /bin/busybox insmod /modules/$module; done
/bin/busybox mount -t ext4 /dev/vda /disk
/bin/busybox umount /dev
exec /bin/busybox switch_root /disk /sbin/init
";

/// Runs from the disk: says what it reads there, and writes some of its own.
const DISK_INIT: &str = "#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
exec >/dev/ttyS0 2>&1 </dev/null
echo payload $(/bin/busybox sha256sum </payload)
/bin/busybox cp /payload /copy
/bin/busybox mount -o remount,ro / && echo written
/bin/busybox reboot -f
";

/// What a guest is made of.
pub struct Parts {
    qemu: PathBuf,
    kernel: PathBuf,
    modules: PathBuf,
    busybox: PathBuf,
}

impl Parts {
    /// Finds the parts on this machine, or unpacks Debian's packages of them in `cache`.
    ///
    /// # Errors
    /// One is missing and cannot be fetched; the sentence names its package.
    pub fn find(cache: &Path) -> anyhow::Result<Self> {
        let qemu = QEMU
            .find()
            .with_context(|| format!("{} is missing: install {}", QEMU.program, QEMU.package))?;
        let (kernel, modules) = match kernel_in(Path::new("/")) {
            Some(found) => found,
            None => {
                let root = unpacked(cache, "linux-image-cloud-amd64")?;
                kernel_in(&root).with_context(|| format!("{} has no kernel", root.display()))?
            }
        };
        let installed = Path::new("/bin/busybox");
        let busybox = match fs::read(installed) {
            Ok(bytes) if find(&bytes, b"ld-linux").is_none() => installed.to_owned(),
            _ => unpacked(cache, "busybox-static")?.join("bin/busybox"),
        };
        Ok(Self { qemu, kernel, modules, busybox })
    }

    /// Makes an ext4 disk from which a guest runs that says the SHA-256 of `payload` and copies it
    /// to `/copy`.
    ///
    /// # Errors
    /// A program is missing or fails.
    pub fn make_disk(&self, disk: &Path, payload: &[u8], size_bytes: u64) -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        for name in ["bin", "sbin", "dev", "proc"] {
            fs::create_dir(folder.path().join(name))?;
        }
        fs::copy(&self.busybox, folder.path().join("bin/busybox"))?;
        fs::write(folder.path().join("payload"), payload)?;
        let init = folder.path().join("sbin/init");
        fs::write(&init, DISK_INIT)?;
        for program in [init, folder.path().join("bin/busybox")] {
            fs::set_permissions(program, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        }
        fs::File::create(disk)?.set_len(size_bytes)?;
        let from = folder.path().as_os_str();
        Tool::MKFS_EXT4.run(&["-q".as_ref(), "-F".as_ref(), "-d".as_ref(), from, disk.as_ref()])?;
        Ok(())
    }

    /// The initramfs, an archive in cpio's "newc" format.
    ///
    /// # Errors
    /// A module cannot be read.
    pub fn initramfs(&self) -> anyhow::Result<Vec<u8>> {
        let mut archive = Archive::default();
        for name in ["bin", "dev", "disk", "modules"] {
            archive.add(name, 0o040_755, &[]);
        }
        archive.add("bin/busybox", 0o100_755, &fs::read(&self.busybox)?);
        archive.add("init", 0o100_755, INITRAMFS_INIT.as_bytes());
        let mut modules = Vec::new();
        let files = module_files(&self.modules)?;
        for name in MODULES {
            load_order(name, &files, &mut modules)?;
        }
        for (number, (name, bytes)) in modules.iter().enumerate() {
            archive.add(&format!("modules/{number:03}-{name}.ko"), 0o100_644, bytes);
        }
        Ok(archive.end())
    }

    /// Boots a guest with one disk, as qemu's `-drive` describes it, and returns what it says on
    /// its serial console until it ends.
    ///
    /// # Errors
    /// The emulator cannot be started, fails, or takes too long.
    pub fn boot(&self, initramfs: &Path, drive: &str) -> anyhow::Result<String> {
        let output = Command::new("timeout")
            .arg(RUN_SECONDS_MAX.to_string())
            .arg(&self.qemu)
            .args(["-accel", "tcg", "-m", "256", "-nodefaults", "-display", "none"])
            .args(["-no-reboot", "-serial", "stdio", "-append", "console=ttyS0 quiet panic=-1"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-drive", &format!("if=virtio,{drive}")])
            .stdin(std::process::Stdio::null())
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{drive}: {}: {}{said}", output.status, error_of(&output));
        Ok(said)
    }
}

fn error_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

/// The first kernel below `root` whose modules are there too.
fn kernel_in(root: &Path) -> Option<(PathBuf, PathBuf)> {
    let entries = fs::read_dir(root.join("boot")).ok()?;
    entries.flatten().find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let modules = root.join("lib/modules").join(name.strip_prefix("vmlinuz-")?);
        fs::File::open(entry.path()).ok()?;
        modules.is_dir().then(|| (entry.path(), modules))
    })
}

/// A package, or what a package without files of its own stands for, unpacked but not installed.
fn unpacked(cache: &Path, package: &str) -> anyhow::Result<PathBuf> {
    let root = cache.join(package);
    if root.exists() {
        return Ok(root);
    }
    fs::create_dir_all(cache)?;
    let folder = tempfile::tempdir_in(cache)?;
    let missing = || format!("install {package}; fetching it failed");
    let depends = run(Command::new("apt-cache").args(["depends", package]))
        .with_context(missing)?
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned);
    let real = depends.as_deref().unwrap_or(package);
    run(Command::new("apt-get").args(["download", "-q", real]).current_dir(&folder))
        .with_context(missing)?;
    let root_new = folder.path().join("root");
    for entry in fs::read_dir(&folder)? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("deb")) {
            run(Command::new("dpkg").arg("-x").arg(path).arg(&root_new)).with_context(missing)?;
        }
    }
    match fs::rename(root_new, &root) {
        // Another test was faster.
        Err(_) if root.exists() => Ok(root),
        renamed => renamed.map(|()| root).with_context(missing),
    }
}

fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", error_of(&output));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Every module by its name.
fn module_files(folder: &Path) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let (mut files, mut folders) = (BTreeMap::new(), vec![folder.join("kernel")]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().replace('-', "_");
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if let Some((name, _)) = name.split_once(".ko") {
                files.insert(name.to_owned(), entry.path());
            }
        }
    }
    Ok(files)
}

/// Adds a module after those that it depends on. What has no file is built in.
fn load_order(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    order: &mut Vec<(String, Vec<u8>)>,
) -> anyhow::Result<()> {
    let Some(path) = files.get(name).filter(|_| order.iter().all(|(there, _)| there != name))
    else {
        return Ok(());
    };
    let bytes = match path.extension().and_then(OsStr::to_str) {
        Some("ko") => fs::read(path)?,
        Some("xz") => Command::new("xz").arg("-dc").arg(path).output()?.stdout,
        _ => bail!("{} is compressed in a way that is not known here", path.display()),
    };
    if let Some(at) = find(&bytes, b"\0depends=") {
        let text = bytes[at + 9..].split(|byte| *byte == 0).next().unwrap_or_default();
        for needed in String::from_utf8_lossy(text).split(',').filter(|name| !name.is_empty()) {
            load_order(&needed.replace('-', "_"), files, order)?;
        }
    }
    order.push((name.to_owned(), bytes));
    Ok(())
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    files: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.files += 1;
        let (length, name_length) = (content.len() as u32, name.len() as u32 + 1);
        self.bytes.extend_from_slice(b"070701");
        let fields = [self.files, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, name_length, 0];
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}
