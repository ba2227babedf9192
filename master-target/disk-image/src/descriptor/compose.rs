//! New descriptors.

use crate::{
    geometry::{AdapterType, Geometry},
    identity::{ContentId, DiskUuid},
    kind::Kind,
};

/// What a new descriptor says.
#[derive(Debug, Clone)]
pub(crate) struct Composition {
    pub(crate) kind: Kind,
    /// The extents' lengths in sectors and their names, in order.
    pub(crate) extents: Vec<(u64, String)>,
    pub(crate) content_id: ContentId,
    pub(crate) long_content_id: String,
    pub(crate) uuid: DiskUuid,
    pub(crate) adapter: AdapterType,
    pub(crate) hardware_version: u32,
    pub(crate) thin: bool,
    /// Content id and path of the parent.
    pub(crate) parent: Option<(ContentId, String)>,
}

/// The text in the order and spelling that ESXi uses.
///
/// qemu wants an offset after a `FLAT` extent's name and refuses one after any other's.
pub(crate) fn compose(new: &Composition) -> String {
    let disk_sectors: u64 = new.extents.iter().map(|(sectors, _)| sectors).sum();
    let Geometry { cylinders, heads, sectors } = Geometry::of(new.adapter, disk_sectors);
    let (extent_type, offset) = match new.kind {
        Kind::MonolithicFlat | Kind::TwoGbMaxExtentFlat => ("FLAT", " 0"),
        Kind::Vmfs => ("VMFS", ""),
        _ => ("SPARSE", ""),
    };
    let thin = if new.thin { "ddb.thinProvisioned = \"1\"\n" } else { "" };
    let extents: String = new
        .extents
        .iter()
        .map(|(sectors, name)| format!("RW {sectors} {extent_type} \"{name}\"{offset}\n"))
        .collect();
    let (parent_content_id, hint) = match &new.parent {
        Some((id, path)) => (*id, format!("parentFileNameHint=\"{path}\"\n")),
        None => (ContentId::NO_PARENT, String::new()),
    };
    format!(
        "# Disk DescriptorFile\n\
         version=1\n\
         encoding=\"UTF-8\"\n\
         CID={cid}\n\
         parentCID={parent_content_id}\n\
         isNativeSnapshot=\"no\"\n\
         createType=\"{create_type}\"\n\
         {hint}\
         \n\
         # Extent description\n\
         {extents}\
         \n\
         # The Disk Data Base\n\
         #DDB\n\
         \n\
         ddb.adapterType = \"{adapter}\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"{sectors}\"\n\
         ddb.longContentID = \"{long_content_id}\"\n\
         {thin}\
         ddb.uuid = \"{uuid}\"\n\
         ddb.virtualHWVersion = \"{hardware_version}\"\n",
        cid = new.content_id,
        create_type = new.kind.name(),
        adapter = new.adapter,
        long_content_id = new.long_content_id,
        uuid = new.uuid,
        hardware_version = new.hardware_version,
    )
}
