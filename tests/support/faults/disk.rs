//! What a disk can hold after the power went, replayed from a trace.
//!
//! Only a sync makes anything durable: of a file, all that was written to it before; of a
//! directory, the names in it. Whatever was not synced is there or not, by chance: whole
//! calls, or single sectors of 512 bytes of them, in any order.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use super::dice::Dice;
use super::trace::Record;

const SECTOR: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    File(usize),
    Directory,
}

#[derive(Debug, Clone)]
enum FileChange {
    Write { offset: usize, bytes: Vec<u8> },
    Truncate(usize),
}

impl FileChange {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Write { offset, bytes } => {
                let end = offset + bytes.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*offset..end].copy_from_slice(bytes);
            }
            Self::Truncate(length) => content.resize(*length, 0),
        }
    }
}

#[derive(Debug, Clone, Default)]
struct File {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// Changes that no sync has covered, each with its place in the trace.
    pending: Vec<(usize, FileChange)>,
}

#[derive(Debug, Clone)]
enum NameChange {
    Put(PathBuf, Entry),
    Move(PathBuf, PathBuf, Entry),
    /// Of two directories, with what is in them.
    Exchange(PathBuf, PathBuf),
    Remove(PathBuf),
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, Entry>) {
        match self {
            Self::Put(path, entry) => {
                names.insert(path.clone(), *entry);
            }
            Self::Move(from, to, entry) => {
                if names.get(from) == Some(entry) {
                    names.remove(from);
                }
                // What is in a directory goes with it, whether its old name was ever durable or not.
                let inside: Vec<PathBuf> = names.keys().filter(|path| path.starts_with(from)).cloned().collect();
                for path in inside.iter().filter(|_| *entry == Entry::Directory) {
                    let entry = names.remove(path).expect("it was there");
                    names.insert(to.join(path.strip_prefix(from).expect("it is inside")), entry);
                }
                names.insert(to.clone(), *entry);
            }
            Self::Exchange(a, b) => {
                *names =
                    std::mem::take(names).into_iter().map(|(path, entry)| (exchanged(&path, a, b), entry)).collect();
            }
            Self::Remove(path) => {
                names.remove(path);
            }
        }
    }

    fn is_in(&self, directory: &Path) -> bool {
        let of = |path: &PathBuf| path.parent() == Some(directory);
        match self {
            Self::Put(path, _) | Self::Remove(path) => of(path),
            Self::Move(from, to, _) | Self::Exchange(from, to) => of(from) || of(to),
        }
    }
}

/// What a path is called when these two have exchanged their names.
fn exchanged(path: &Path, a: &Path, b: &Path) -> PathBuf {
    let moved = |from: &Path, to: &Path| path.strip_prefix(from).ok().map(|rest| to.join(rest));
    moved(a, b).or_else(|| moved(b, a)).unwrap_or_else(|| path.to_path_buf())
}

/// How chance treats what was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// None of it is there.
    All,
    /// All of it is there, as after a crash of the process alone.
    Nothing,
    /// The first so many hundredths of it are there, in the order of writing.
    Tail(u64),
    /// Each call's by itself, with so many hundredths.
    Calls(u64),
    /// Each sector of each call by itself, with so many hundredths.
    Sectors(u64),
}

impl Loss {
    pub fn any(dice: &mut Dice) -> Self {
        match dice.below(8) {
            0 => Self::All,
            1 => Self::Nothing,
            2 => Self::Tail(dice.below(100)),
            3 | 4 => Self::Calls(10 + dice.below(80)),
            _ => Self::Sectors(10 + dice.below(80)),
        }
    }
}

/// The watched directory while a trace is replayed.
#[derive(Debug, Clone)]
pub struct Disk {
    root: PathBuf,
    files: Vec<File>,
    live: BTreeMap<PathBuf, Entry>,
    durable: BTreeMap<PathBuf, Entry>,
    pending: Vec<(usize, NameChange)>,
    /// What descriptors are of.
    open: HashMap<i32, PathBuf>,
    inodes: HashMap<i32, usize>,
    at: usize,
}

/// What a directory holds: files with their bytes, and directories.
pub type Image = BTreeMap<PathBuf, Option<Vec<u8>>>;

impl Disk {
    /// A disk on which all of this is durable.
    pub fn new(root: &Path, image: &Image) -> Self {
        let root = root.canonicalize().unwrap();
        let mut files = Vec::new();
        let mut entry = |content: &Option<Vec<u8>>| match content {
            Some(bytes) => {
                files.push(File { live: bytes.clone(), durable: bytes.clone(), pending: Vec::new() });
                Entry::File(files.len() - 1)
            }
            None => Entry::Directory,
        };
        let names: BTreeMap<PathBuf, Entry> =
            image.iter().map(|(path, content)| (root.join(path), entry(content))).collect();
        Self {
            root,
            files,
            live: names.clone(),
            durable: names,
            pending: Vec::new(),
            open: HashMap::new(),
            inodes: HashMap::new(),
            at: 0,
        }
    }

    /// Takes in the next record.
    pub fn follow(&mut self, record: &Record) {
        self.at += 1;
        match record {
            Record::Start => {
                self.open.clear();
                self.inodes.clear();
            }
            Record::Open { fd, path, created, truncated } => {
                if *created {
                    self.files.push(File::default());
                    self.name(NameChange::Put(path.clone(), Entry::File(self.files.len() - 1)));
                }
                self.open.insert(*fd, path.clone());
                self.inodes.remove(fd);
                if let Some(Entry::File(inode)) = self.live.get(path) {
                    self.inodes.insert(*fd, *inode);
                    if *truncated {
                        self.change(*fd, FileChange::Truncate(0));
                    }
                }
            }
            Record::Close(fd) => {
                self.open.remove(fd);
                self.inodes.remove(fd);
            }
            Record::Write { fd, offset, bytes } => {
                let offset = usize::try_from(*offset).unwrap();
                self.change(*fd, FileChange::Write { offset, bytes: bytes.clone() });
            }
            Record::Truncate { fd, length } => {
                self.change(*fd, FileChange::Truncate(usize::try_from(*length).unwrap()));
            }
            Record::Sync(fd) => self.sync(*fd),
            Record::Rename { from, to } => {
                let entry = self.live[from];
                self.name(NameChange::Move(from.clone(), to.clone(), entry));
            }
            Record::Exchange(a, b) => {
                self.name(NameChange::Exchange(a.clone(), b.clone()));
                self.open.values_mut().for_each(|path| *path = exchanged(path, a, b));
            }
            Record::Unlink(path) | Record::RemoveDir(path) => self.name(NameChange::Remove(path.clone())),
            Record::MakeDir(path) => self.name(NameChange::Put(path.clone(), Entry::Directory)),
            Record::Send { .. } | Record::Fault { .. } => {}
        }
    }

    fn name(&mut self, change: NameChange) {
        change.apply(&mut self.live);
        self.pending.push((self.at, change));
    }

    fn change(&mut self, fd: i32, change: FileChange) {
        let inode =
            *self.inodes.get(&fd).unwrap_or_else(|| panic!("a change of {:?}, which is no file", self.open.get(&fd)));
        let file = &mut self.files[inode];
        change.apply(&mut file.live);
        file.pending.push((self.at, change));
    }

    fn sync(&mut self, fd: i32) {
        if let Some(inode) = self.inodes.get(&fd) {
            let file = &mut self.files[*inode];
            for (_, change) in std::mem::take(&mut file.pending) {
                change.apply(&mut file.durable);
            }
            return;
        }
        let directory = self.open[&fd].clone();
        let (synced, rest) = std::mem::take(&mut self.pending).into_iter().partition(|(_, c)| c.is_in(&directory));
        self.pending = rest;
        let synced: Vec<(usize, NameChange)> = synced;
        synced.iter().for_each(|(_, change)| change.apply(&mut self.durable));
    }

    /// What the processes saw: every change, synced or not.
    pub fn seen(&self) -> Image {
        self.image_of(&self.live, |file| file.live.clone())
    }

    /// What is left when the power goes now.
    pub fn after_power_cut(&self, loss: Loss, dice: &mut Dice) -> Image {
        let places: Vec<usize> = {
            let files = self.files.iter().flat_map(|file| file.pending.iter().map(|(at, _)| *at));
            let mut places: Vec<usize> = files.chain(self.pending.iter().map(|(at, _)| *at)).collect();
            places.sort_unstable();
            places
        };
        let tail = match loss {
            Loss::Tail(share) => {
                let kept = places.len() * usize::try_from(share).unwrap() / 100;
                places.get(kept).copied().unwrap_or(usize::MAX)
            }
            _ => usize::MAX,
        };
        let mut keeps = |at: usize| match loss {
            Loss::All => false,
            Loss::Nothing => true,
            Loss::Tail(_) => at < tail,
            Loss::Calls(share) | Loss::Sectors(share) => dice.below(100) < share,
        };
        let mut names = self.durable.clone();
        for (at, change) in &self.pending {
            if keeps(*at) {
                change.apply(&mut names);
            }
        }
        let contents: Vec<Vec<u8>> = self.files.iter().map(|file| remains(file, loss, &mut keeps)).collect();
        let mut image = Image::new();
        for (path, entry) in &names {
            // A name is only there if all directories above it are.
            let mut above = path.ancestors().skip(1).take_while(|above| *above != self.root);
            if !above.all(|above| names.get(above) == Some(&Entry::Directory)) {
                continue;
            }
            let content = match entry {
                Entry::File(inode) => Some(contents[*inode].clone()),
                Entry::Directory => None,
            };
            image.insert(path.strip_prefix(&self.root).unwrap().to_path_buf(), content);
        }
        image
    }

    fn image_of(&self, names: &BTreeMap<PathBuf, Entry>, content: impl Fn(&File) -> Vec<u8>) -> Image {
        let row = |(path, entry): (&PathBuf, &Entry)| {
            let content = match entry {
                Entry::File(inode) => Some(content(&self.files[*inode])),
                Entry::Directory => None,
            };
            (path.strip_prefix(&self.root).unwrap().to_path_buf(), content)
        };
        names.iter().map(row).collect()
    }
}

/// A file after a power cut. A sector is as it was after some change of it, with all before.
fn remains(file: &File, loss: Loss, keeps: &mut impl FnMut(usize) -> bool) -> Vec<u8> {
    let mut disk = file.durable.clone();
    let mut seen = file.durable.clone();
    for (at, change) in &file.pending {
        change.apply(&mut seen);
        match change {
            FileChange::Truncate(length) => {
                if keeps(*at) {
                    disk.resize(*length, 0);
                }
            }
            FileChange::Write { offset, bytes } => {
                let whole = !matches!(loss, Loss::Sectors(_));
                let kept = whole && keeps(*at);
                for sector in offset / SECTOR..(offset + bytes.len()).div_ceil(SECTOR) {
                    if kept || (!whole && keeps(*at)) {
                        let (from, to) = (sector * SECTOR, ((sector + 1) * SECTOR).min(seen.len()));
                        if disk.len() < to {
                            disk.resize(to, 0);
                        }
                        disk[from..to].copy_from_slice(&seen[from..to]);
                    }
                }
            }
        }
    }
    disk
}

/// What a directory holds.
pub fn image_of(directory: &Path) -> Image {
    let mut image = Image::new();
    let mut open = vec![directory.to_path_buf()];
    while let Some(path) = open.pop() {
        for entry in std::fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(directory).unwrap().to_path_buf();
            if path.is_dir() {
                image.insert(name, None);
                open.push(path);
            } else {
                image.insert(name, Some(std::fs::read(&path).unwrap()));
            }
        }
    }
    image
}

/// Makes a directory hold this and nothing else.
pub fn put_image(directory: &Path, image: &Image) {
    if directory.exists() {
        std::fs::remove_dir_all(directory).unwrap();
    }
    std::fs::create_dir_all(directory).unwrap();
    for (path, content) in image {
        match content {
            None => std::fs::create_dir_all(directory.join(path)).unwrap(),
            Some(bytes) => std::fs::write(directory.join(path), bytes).unwrap(),
        }
    }
}
