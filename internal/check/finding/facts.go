package finding

import "cri-dockerd/internal/shell"

// Facts are all that package probe has seen of a node. What could not be seen is zero; the fields
// say what zero means.
type Facts struct {
	Root      bool        // check runs as root
	Foreign   string      // why processes of the host may be invisible to check, "" if they are not
	Untrusted []Untrusted // files that were not read, since other users than root can change them
	Systemd   bool        // systemd is process 1 (sd_booted(3))
	Debian    bool        // apt-get is there
	Flags     Flags
	Engine    Engine
	Daemon    Daemon
	Logs      LogDriver
	CNI       CNI
	Kubelet   Kubelet
	Node      Node
}

// Flags are the daemon's settings that matter here, whoever gave them.
type Flags struct {
	// in words: the command line of check, the running daemon, its unit, the defaults
	Source        string
	Endpoint      string // of the CRI, as a client gives it: unix:///path or tcp://host:port
	Socket        string // the path in Endpoint, "" for TCP
	Docker        string // where Docker listens
	NetworkPlugin string
	CNIConfDir    string
	CNIBinDirs    []string
	RunDirectory  string
	PauseImage    string            // "" is the embedded one
	ContainerLog  string            // auto, cri or json-file
	Command       shell.Line        // starts the daemon with these flags, without systemd
	Files         map[string]string // flag: the file of a unit in which it stands
	Mistake       Mistake           // with which the daemon does not start
}

// Untrusted is a file that is not believed.
type Untrusted struct {
	File string
	// what of it other users can change: the file itself, a directory or a link on the way
	Because string
	Reason  string
	Shared  bool // Because is a directory for everybody, such as /tmp
}

// Mistake is a flag of the daemon's unit that it does not know, or whose value it does not take.
type Mistake struct {
	Error   string // "" is none
	Flag    string // "" if the error alone tells it
	File    string // in which it stands
	Nearest string // of the known flags, for one that is unknown
}

// Problem is why somebody does not answer.
type Problem string

// The problems, "" is none.
const (
	Missing  Problem = "missing"   // there is no such socket
	Refused  Problem = "refused"   // nobody listens
	Denied   Problem = "denied"    // permission denied
	Silent   Problem = "silent"    // no answer in time
	TLS      Problem = "tls"       // certificates, or plain text where TLS is spoken
	TooOld   Problem = "too old"   // an engine's API
	NoSocket Problem = "no socket" // the path is something else
	NotRoot  Problem = "not root"  // a process of another user listens there
	Other    Problem = "other"
)

// Engine is Docker Engine.
type Engine struct {
	Problem Problem
	Error   string // the words of Problem
	// of the process that listens at the socket, if it is a dockerd of root on this host; else 0
	PID           int
	Installed     bool // a dockerd or its unit is on this machine
	SysV          bool // /etc/init.d/docker is there
	Version, API  string
	CgroupDriver  string
	StorageDriver string
	RootDir       string
	LogDriver     string
	LiveRestore   bool
	MapsUsers     bool   // it runs with userns-remap
	MinOOMScore   int    // the lowest oom_score_adj that containers can get
	Config        Config // daemon.json
	// what is wrong with the sandbox image of --pod-infra-container-image, "" if it is there
	PauseImage    string
	PausePullable bool // its registry has it
}

// Config is a file of JSON.
type Config struct {
	File  string
	Text  string // "" if it is not there
	Error string // why it cannot be read or is not JSON
	Keys  map[string]any
}

// Daemon is the CRI server and its socket.
type Daemon struct {
	Problem    Problem
	Error      string
	Socket     Socket
	Runtime    string // name and version, as the CRI's Version has them
	Conditions []Condition
	Processes  []Process // all daemons of this name that belong to root, in the namespaces of check
	// the process that holds the lock on the root directory while the daemon does not answer; 0 if
	// none does
	LockHolder int
	Unit       string   // of systemd, without suffix; "" if there is none
	Enabled    bool     // Unit is started at boot
	Others     []string // further units of such a daemon that are started at boot
	Streaming  Streaming
}

// Socket is the file of a unix socket.
type Socket struct {
	Exists bool
	Mode   uint32 // permission bits
	Owner  int    // user ID
	Group  string // name, or number without one
}

// Condition is one of the CRI's Status.
type Condition struct {
	Type            string
	Status          bool
	Reason, Message string
}

// Process is a running CRI daemon.
type Process struct {
	PID     int
	Program string
	Ours    bool // it is this program, perhaps of another release
	Judged  bool // it is the one whose flags and socket are looked at
}

// Streaming is the server of exec, attach and port-forward.
type Streaming struct {
	Known        bool     // the addresses could be found out
	Addresses    []string // where the daemon listens on TCP
	Error        string   // why none of them can be reached
	LoopbackDown bool
}

// LogDriver is the log-driver process.
type LogDriver struct {
	Socket  string
	Problem Problem
	Error   string
	PID     int  // of who listens on its socket, 0 if unknown
	Unit    bool // systemd has cri-docker-log.service
}

// CNI is what the daemon finds in the directories of configurations and plugins.
type CNI struct {
	Error string // why the directory cannot be read
	Files []CNIFile
	// plugins that the network needs and that are in none of the plugin directories
	Missing []string
	Found   map[string]string // plugin of Missing: where on this machine it is nevertheless
	Bridge  bool              // pods are connected to a bridge
}

// CNIFile is a configuration, in name order; the first valid one counts.
type CNIFile struct{ File, Network, Error string }

// Kubelet is the kubelet of this machine, running or not.
type Kubelet struct {
	Present    bool   // a program or a configuration is there
	Version    string // "v1.36.3", "" if unknown
	Minor      int    // 36, 0 if unknown
	Flags      []Flag // in order, the last one counts
	ConfigFile string // "" if there is none
	ConfigErr  string
	Config     KubeletConfig
	Joined     bool // the node belongs to a cluster (/etc/kubernetes/kubelet.conf)
	Admin      bool // kubectl can be used here (/etc/kubernetes/admin.conf)
	Kubeadm    bool // kubeadm is installed
}

// Flag is one flag of the kubelet and the file in which it stands, "" if it was only seen on the
// running one.
type Flag struct{ Name, Value, File string }

// KubeletConfig are the keys of a KubeletConfiguration that matter here.
type KubeletConfig struct {
	CgroupDriver             string            `yaml:"cgroupDriver"`
	ContainerRuntimeEndpoint string            `yaml:"containerRuntimeEndpoint"`
	FailSwapOn               *bool             `yaml:"failSwapOn"`
	FailCgroupV1             *bool             `yaml:"failCgroupV1"`
	FeatureGates             map[string]bool   `yaml:"featureGates"`
	EvictionHard             map[string]string `yaml:"evictionHard"`
}

// Node is the machine.
type Node struct {
	Year        int
	ClockKnown  bool // the kernel said whether the clock is synchronised
	ClockSynced bool
	CgroupV1    bool
	Swaps       []string // devices and files
	FstabSwap   bool
	IPForward   string // of /proc/sys, "" if it is not there
	BridgeNF    string // the same; "" without br_netfilter
	Overlay     bool   // the kernel has overlayfs
	DockerGroup bool
	OtherCRI    []string // sockets of other CRI servers that answer
	Disks       []Disk
	Directories []Directory
}

// Disk is a file system, in bytes and inodes; Inodes is 0 where there are none to count.
type Disk struct {
	Path         string
	Signal       string // the kubelet's name for it: nodefs, imagefs
	Total, Free  uint64
	Inodes, IFre uint64
}

// Directory is one that the daemon writes to.
type Directory struct {
	Path, Flag string
	Error      string // why it cannot be written to
	ReadOnly   string // the mount point of its read-only file system
}
