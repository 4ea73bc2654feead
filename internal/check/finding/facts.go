package finding

import (
	"time"

	"cri-dockerd/internal/shell"
)

// Facts is the state of a node as gathered by package probe. A fact that probe could not gather has
// its zero value.
type Facts struct {
	Root      bool        // check runs as root
	Foreign   string      // why check may miss processes of the host, "" if it sees all of them
	Untrusted []Untrusted // files that were skipped because users other than root can change them
	Systemd   bool        // systemd is process 1 (sd_booted(3))
	Debian    bool        // apt-get is installed
	Flags     Flags
	Engine    Engine
	Daemon    Daemon
	Logs      LogDriver
	NRI       NRI
	CNI       CNI
	Kubelet   Kubelet
	Node      Node
}

// Flags are the daemon's effective settings.
type Flags struct {
	// description of the origin: the command line of check, the running daemon, its unit, defaults
	Source        string
	Endpoint      string // of the CRI, in a client's form: unix:///path or tcp://host:port
	Socket        string // the path in Endpoint, "" for TCP
	Docker        string // address of the Docker API
	NetworkPlugin string
	CNIConfDir    string
	CNIBinDirs    []string
	RunDirectory  string
	PauseImage    string            // "" is the embedded one
	Containers    string            // engine, shim or auto
	ContainerLog  string            // auto, cri or json-file
	Command       shell.Line        // starts the daemon with these flags, without systemd
	Files         map[string]string // flag name: the unit's file with the flag
	Mistake       Mistake           // prevents the daemon from starting
}

// NRI are the files of NRI plugins. It is empty without --nri-socket.
type NRI struct {
	Misnamed  []string // plugins of --nri-plugin-dir with an invalid name
	Validator string   // error of --nri-validator-config, "" for none
	BlockIO   string   // error of --nri-blockio-config, "" for none
}

// Untrusted is a file that check skips because users other than root can change it.
type Untrusted struct {
	File   string
	Path   string // the part others can change: the file, a parent directory or a symbolic link
	Reason string
	Shared bool // Path is a world-writable directory, such as /tmp
}

// Mistake is an unknown flag or an invalid value on the command line of the daemon's unit.
type Mistake struct {
	Error   string // "" is none
	Flag    string // "" if the error is not about a single flag
	File    string // the file with the flag
	Nearest string // the known flag with the most similar name, for an unknown flag
}

// Problem is the kind of a connection failure.
type Problem string

// Problems; "" is none.
const (
	Missing  Problem = "missing"   // the socket does not exist
	Refused  Problem = "refused"   // nothing listens on the socket
	Denied   Problem = "denied"    // permission denied
	Silent   Problem = "silent"    // no response within the timeout
	TLS      Problem = "tls"       // certificate mismatch, or plain text sent to a TLS port
	TooOld   Problem = "too old"   // the engine's API version is unsupported
	NoSocket Problem = "no socket" // the path is not a socket
	NotRoot  Problem = "not root"  // a process of another user listens on the socket
	Other    Problem = "other"
)

// Engine is the state of Docker Engine.
type Engine struct {
	Problem Problem
	Error   string        // message for Problem
	Slow    time.Duration // see Daemon.Slow
	Stopped int           // see Daemon.Stopped
	// process ID of the listener, 0 unless it is root's dockerd on this host
	PID           int
	Installed     bool // dockerd or its unit is installed
	SysV          bool // /etc/init.d/docker exists
	Version, API  string
	CgroupDriver  string
	StorageDriver string
	RootDir       string
	LogDriver     string
	LiveRestore   bool
	MapsUsers     bool   // the engine runs with userns-remap
	MinOOMScore   int    // lowest oom_score_adj available to containers
	Config        Config // daemon.json
	// error about the sandbox image of --pod-infra-container-image, "" if the image is present
	PauseImage    string
	PausePullable bool // the image's registry has it
}

// Config is a JSON file.
type Config struct {
	File  string
	Text  string // "" if the file does not exist
	Error string // read or syntax error
	Keys  map[string]any
}

// Daemon is the state of the CRI server and its socket.
type Daemon struct {
	Problem Problem
	Error   string
	// Slow is the time of the slowest call, with or without a response, if it exceeded the timeout
	// of check; otherwise 0.
	Slow time.Duration
	// Stopped is the ID of a process of the service that is stopped by a signal or a debugger, if
	// there was no response; otherwise 0.
	Stopped    int
	Socket     Socket
	Runtime    string // name and version from the CRI's Version
	Conditions []Condition
	Processes  []Process // root's daemons of this name in the namespaces of check
	// holder of the lock on the root directory while the daemon does not respond; 0 if none
	LockHolder int
	Unit       string   // systemd unit without suffix; "" if there is none
	Enabled    bool     // Unit starts at boot
	Others     []string // other units of a CRI daemon for Docker that start at boot
	Streaming  Streaming
}

// Socket is the file of a unix socket.
type Socket struct {
	Exists bool
	Mode   uint32 // permission bits
	Owner  int    // user ID
	Group  string // name, or number without one
}

// Condition is a runtime condition of the CRI's Status.
type Condition struct {
	Type            string
	Status          bool
	Reason, Message string
}

// Process is a running CRI daemon.
type Process struct {
	PID     int
	Program string
	Ours    bool // runs this program, in this or another release
	Checked bool // Flags and Socket describe this process
}

// Streaming is the state of the server for exec, attach and port-forward.
type Streaming struct {
	Known        bool     // the addresses are known
	Addresses    []string // TCP addresses of the server
	Error        string   // why none of them is reachable
	LoopbackDown bool
}

// LogDriver is the state of the log-driver process.
type LogDriver struct {
	Socket  string
	Problem Problem
	Error   string
	Slow    time.Duration // see Daemon.Slow
	Stopped int           // see Daemon.Stopped
	PID     int           // listener of the socket, 0 if unknown
	Unit    bool          // systemd has cri-docker-log.service
}

// CNI is the content of the directories for CNI configurations and plugins.
type CNI struct {
	Error string // why the configuration directory is not readable
	Files []CNIFile
	// required plugins missing from all plugin directories
	Missing []string
	Found   map[string]string // plugin of Missing: its path outside of the plugin directories
	Bridge  bool              // the network connects pods to a bridge
}

// CNIFile is a CNI configuration. Files are in name order, and the first valid one is in effect.
type CNIFile struct{ File, Network, Error string }

// Kubelet is the kubelet of this node, running or not.
type Kubelet struct {
	Present    bool   // a program or a configuration exists
	Version    string // "v1.36.3", "" if unknown
	Minor      int    // 36, 0 if unknown
	Flags      []Flag // in order; the last one of a name is in effect
	ConfigFile string // "" if there is none
	ConfigErr  string
	Config     KubeletConfig
	Joined     bool // the node is part of a cluster (/etc/kubernetes/kubelet.conf)
	Admin      bool // kubectl is usable on this node (/etc/kubernetes/admin.conf)
	Kubeadm    bool // kubeadm is installed
}

// Flag is a flag of the kubelet and its file. File is "" if only the running process has the flag.
type Flag struct{ Name, Value, File string }

// KubeletConfig has the keys of a KubeletConfiguration that findings depend on.
type KubeletConfig struct {
	CgroupDriver             string            `yaml:"cgroupDriver"`
	ContainerRuntimeEndpoint string            `yaml:"containerRuntimeEndpoint"`
	FailSwapOn               *bool             `yaml:"failSwapOn"`
	FailCgroupV1             *bool             `yaml:"failCgroupV1"`
	FeatureGates             map[string]bool   `yaml:"featureGates"`
	EvictionHard             map[string]string `yaml:"evictionHard"`
}

// Node is the state of the host.
type Node struct {
	Year        int
	ClockKnown  bool // adjtimex(2) succeeded
	ClockSynced bool
	CgroupV1    bool
	Swaps       []string // devices and files
	FstabSwap   bool
	IPForward   string // net.ipv4.ip_forward, "" if unknown
	BridgeNF    string // net.bridge.bridge-nf-call-iptables, "" without br_netfilter
	Overlay     bool   // the kernel has overlayfs
	DockerGroup bool
	OtherCRI    []string // sockets of other running CRI servers
	Disks       []Disk
	Directories []Directory
	Load        Load
}

// Load is the load of the host.
type Load struct {
	CPUs            int
	Average         float64 // of the last minute: running and blocked processes (proc_loadavg(5))
	CPU, Memory, IO float64 // percent of the last 10 s in which a process waited; 0 if unknown
}

// Disk is a file system, in bytes and inodes. Inodes is 0 on file systems without inode limits.
type Disk struct {
	Path         string
	Signal       string // the kubelet's name for the file system: nodefs, imagefs
	Total, Free  uint64
	Inodes, IFre uint64
}

// Directory is a directory the daemon writes to.
type Directory struct {
	Path, Flag string
	Error      string // why it is not writable
	ReadOnly   string // mount point of its read-only file system
}
