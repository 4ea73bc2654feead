package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/rootonly"
)

// Dial connects to the daemon at an endpoint of Adopted, and to nobody but root. It does not wait
// for an answer.
func Dial(endpoint string) (*grpc.ClientConn, error) {
	network, address, found := strings.Cut(endpoint, "://")
	if !found || network != "unix" && network != "tcp" {
		return nil, fmt.Errorf("--container-runtime-endpoint %q: use unix:///path or tcp://host:port", endpoint)
	}

	conn, err := grpc.NewClient("passthrough:///cri", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return rootonly.Dial(ctx, network, address)
		}))
	if err != nil {
		return nil, fmt.Errorf("--container-runtime-endpoint %q: %w", endpoint, err)
	}

	return conn, nil
}

// daemon asks the CRI server what it is and how it is.
func (p *Prober) daemon(ctx context.Context, cfg *config.Config, f finding.Flags, found Adopted) finding.Daemon {
	d := finding.Daemon{Unit: found.Unit, Enabled: p.enabled(found.Unit+".service") || p.enabled(found.Unit+".socket")}
	for _, other := range units() {
		if other != found.Unit && (p.enabled(other+".service") || p.enabled(other+".socket")) {
			d.Others = append(d.Others, other+".service")
		}
	}

	for _, x := range p.daemons() {
		d.Processes = append(d.Processes, finding.Process{
			PID:     x.PID,
			Program: x.Program,
			Ours:    p.ours(x),
			Judged:  found.daemon != nil && found.daemon.PID == x.PID,
		})
	}

	if f.Socket != "" {
		d.Socket = socket(f.Socket)
	}

	d.Problem, d.Error = ask(ctx, f, &d)
	if d.Problem == finding.Missing || d.Problem == finding.Refused {
		d.LockHolder = p.lockHolder(filepath.Join(cfg.RootDirectory, "lock"))
	}
	if d.Problem == "" && found.daemon != nil {
		d.Streaming = p.streaming(ctx, found.daemon.PID, cfg)
	}

	return d
}

// ask calls Version and Status.
func ask(ctx context.Context, f finding.Flags, d *finding.Daemon) (finding.Problem, string) {
	network, address := "unix", f.Socket
	if address == "" {
		network, address, _ = strings.Cut(f.Endpoint, "://")
	}
	if why, err := reach(ctx, network, address); err != nil {
		return why, err.Error()
	}

	conn, err := Dial(f.Endpoint)
	if err != nil {
		return finding.Other, err.Error()
	}
	defer conn.Close()

	client := runtimeapi.NewRuntimeServiceClient(conn)
	s, err := settled(ctx, client)
	if err != nil {
		return rpcProblem(err), status.Convert(err).Message()
	}

	for _, c := range s.GetStatus().GetConditions() {
		d.Conditions = append(d.Conditions, finding.Condition{
			Type:    c.Type,
			Status:  c.Status,
			Reason:  c.Reason,
			Message: c.Message,
		})
	}

	d.Runtime = "its engine is down"
	if v, err := client.Version(ctx, &runtimeapi.VersionRequest{}); err == nil {
		d.Runtime = fmt.Sprintf("%s %s, CRI %s", v.RuntimeName, v.RuntimeVersion, v.RuntimeApiVersion)
	}

	return "", ""
}

// How long a daemon that has just been started may take to become ready, and how often it is asked.
const (
	settleTimeout  = time.Second
	settleInterval = 50 * time.Millisecond
)

// settled is the daemon's Status, which answers also while the engine is down; of one that is not
// ready, the last within settleTimeout.
func settled(ctx context.Context, client runtimeapi.RuntimeServiceClient) (*runtimeapi.StatusResponse, error) {
	tick := time.NewTicker(settleInterval)
	defer tick.Stop()

	for end := time.Now().Add(settleTimeout); ; <-tick.C {
		s, err := client.Status(ctx, &runtimeapi.StatusRequest{})
		ready := slices.ContainsFunc(s.GetStatus().GetConditions(), func(c *runtimeapi.RuntimeCondition) bool {
			return c.Type == runtimeapi.RuntimeReady && c.Status
		})
		if err != nil || ready || time.Now().After(end) {
			return s, err
		}
	}
}

func rpcProblem(err error) finding.Problem {
	if status.Code(err) == codes.DeadlineExceeded {
		return finding.Silent
	}
	return finding.Other
}

// socket is what the file of a socket is.
func socket(path string) finding.Socket {
	st, err := os.Stat(path)
	if err != nil {
		return finding.Socket{}
	}

	s := finding.Socket{Exists: st.Mode()&os.ModeSocket != 0, Mode: uint32(st.Mode().Perm())}
	if sys, isUnix := st.Sys().(*syscall.Stat_t); isUnix {
		s.Owner, s.Group = int(sys.Uid), strconv.Itoa(int(sys.Gid))
		if g, err := user.LookupGroupId(s.Group); err == nil {
			s.Group = g.Name
		}
	}

	return s
}

// lockHolder is the process of root with a flock(2) on a file (/proc/locks, proc_locks(5)), 0 if
// there is none.
func (p *Prober) lockHolder(file string) int {
	st, err := os.Stat(p.path(file))
	if err != nil {
		return 0
	}

	sys, isUnix := st.Sys().(*syscall.Stat_t)
	if !isUnix {
		return 0
	}

	for line := range strings.Lines(p.kernel("/proc/locks")) {
		f := strings.Fields(line) // 1: FLOCK ADVISORY WRITE <pid> <major>:<minor>:<inode> 0 EOF
		if len(f) < 6 || f[1] != "FLOCK" || !strings.HasSuffix(f[5], ":"+strconv.FormatUint(sys.Ino, 10)) {
			continue
		}

		pid, err := strconv.Atoi(f[4])
		if err != nil {
			continue
		}

		if _, err := p.proc.Process(pid); err == nil { // else it is ending, or elsewhere
			return pid
		}
	}

	return 0
}

// streaming finds out where the daemon listens on TCP, and whether that can be reached.
func (p *Prober) streaming(ctx context.Context, pid int, cfg *config.Config) finding.Streaming {
	addrs := p.listening(pid)
	for _, own := range []string{cfg.MetricsAddress, cfg.Endpoint} {
		if tcp, isTCP := strings.CutPrefix(own, "tcp://"); isTCP {
			addrs = slices.DeleteFunc(addrs, func(a string) bool { return a == tcp })
		}
	}

	if len(addrs) == 0 {
		return finding.Streaming{} // only root sees another's sockets
	}

	s := finding.Streaming{Known: true, Addresses: addrs}
	if lo, err := net.InterfaceByName("lo"); err == nil {
		s.LoopbackDown = lo.Flags&net.FlagUp == 0
	}

	var errs []error
	for _, a := range addrs {
		c, err := (&net.Dialer{Timeout: p.timeout / 3}).DialContext(ctx, "tcp", a)
		if err == nil {
			c.Close()
			return s
		}
		errs = append(errs, err)
	}

	s.Error = errors.Join(errs...).Error()

	return s
}

// listening are the TCP addresses at which a process listens, as this machine reaches them.
func (p *Prober) listening(pid int) []string {
	dir, err := p.proc.Open(strconv.Itoa(pid))
	if err != nil {
		return nil
	}
	defer dir.Close()

	sockets := map[string]bool{}
	for _, to := range dir.Links("fd") {
		if inode, isSocket := strings.CutPrefix(to, "socket:["); isSocket {
			sockets[strings.TrimSuffix(inode, "]")] = true
		}
	}

	var out []string
	for _, l := range rootonly.Listeners(dir) {
		if sockets[l.Inode] {
			out = append(out, reachable(l.At).String())
		}
	}

	return out
}

// reachable is an address of a listener as a client dials it: any address is loopback's.
func reachable(at netip.AddrPort) netip.AddrPort {
	switch ip := at.Addr(); {
	case ip.IsUnspecified() && ip.Is4():
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), at.Port())
	case ip.IsUnspecified():
		return netip.AddrPortFrom(netip.IPv6Loopback(), at.Port())
	}
	return at
}

// logDriver asks the log-driver process for its status.
func (p *Prober) logDriver(ctx context.Context) finding.LogDriver {
	l := finding.LogDriver{Socket: driver.Socket, Unit: p.unitFiles("cri-docker-log.service") != nil}
	c, why, err := dial(ctx, driver.Socket)
	if err != nil {
		l.Problem, l.Error = why, err.Error()
		return l
	}

	if cred, err := rootonly.Peer(c); err == nil {
		l.PID = int(cred.Pid)
	}

	c.Close()
	s, _, err := driver.NewClient(driver.Socket).Watch(ctx, nil)
	switch {
	case ctx.Err() != nil:
		l.Problem, l.Error = finding.Silent, ctx.Err().Error()
	case err != nil:
		l.Problem, l.Error = finding.Other, err.Error()
	default:
		l.PID = s.PID
	}

	return l
}
