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

// Dial returns a client connection to a daemon of root at an endpoint from Adopted. It does not
// wait for the connection.
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

// daemon gathers the state of the CRI server.
func (p *Prober) daemon(ctx context.Context, cfg *config.Config, f finding.Flags, found Adopted) finding.Daemon {
	isEnabled := func(unit string) bool { return p.isEnabled(unit+".service") || p.isEnabled(unit+".socket") }
	d := finding.Daemon{Unit: found.Unit, Enabled: isEnabled(found.Unit)}
	for _, other := range units() {
		if other != found.Unit && isEnabled(other) {
			d.Others = append(d.Others, other+".service")
		}
	}

	for _, x := range p.daemons() {
		d.Processes = append(d.Processes, finding.Process{
			PID:     x.PID,
			Program: x.Program,
			Ours:    p.isOurs(x),
			Checked: found.daemon != nil && found.daemon.PID == x.PID,
		})
	}

	if f.Socket != "" {
		d.Socket = socket(f.Socket)
	}

	calls, watch := p.measure(ctx, p.daemons)
	d.Problem, d.Error = queryCRI(calls, watch, f, &d)
	if calls.Err() != nil { // gRPC reports a cancelled call
		d.Problem = finding.Silent
	}

	watch.end()
	d.Slow, d.Stopped = watch.slow(), watch.stopped(d.Problem)

	if d.Problem == finding.Missing || d.Problem == finding.Refused {
		d.LockHolder = p.lockHolder(filepath.Join(cfg.RootDirectory, "lock"))
	}
	if d.Problem == "" && found.daemon != nil {
		d.Streaming = p.streaming(ctx, found.daemon.PID, cfg)
	}

	return d
}

// queryCRI calls Version and Status and adds the results to d.
func queryCRI(ctx context.Context, watch *stopwatch, f finding.Flags, d *finding.Daemon) (finding.Problem, string) {
	network, address := "unix", f.Socket
	if address == "" {
		network, address, _ = strings.Cut(f.Endpoint, "://")
	}
	if kind, err := reach(ctx, network, address); err != nil {
		return kind, err.Error()
	}

	conn, err := Dial(f.Endpoint)
	if err != nil {
		return finding.Other, err.Error()
	}
	defer conn.Close()

	client := runtimeapi.NewRuntimeServiceClient(conn)
	s, err := awaitReady(ctx, watch, client)
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

	d.Runtime = "cri-dockerd (Docker is unavailable)"
	watch.call(func() {
		if v, err := client.Version(ctx, &runtimeapi.VersionRequest{}); err == nil {
			d.Runtime = fmt.Sprintf("%s %s, CRI %s", v.RuntimeName, v.RuntimeVersion, v.RuntimeApiVersion)
		}
	})

	return "", ""
}

// A daemon may need settleTimeout to become ready after its start.
const (
	settleTimeout  = time.Second
	settleInterval = 50 * time.Millisecond
)

// awaitReady polls the daemon's Status until RuntimeReady is true or settleTimeout expires, and
// returns the last response. Status succeeds even without an engine.
func awaitReady(
	ctx context.Context, watch *stopwatch, client runtimeapi.RuntimeServiceClient,
) (s *runtimeapi.StatusResponse, err error) {
	tick := time.NewTicker(settleInterval)
	defer tick.Stop()

	for deadline := time.Now().Add(settleTimeout); ; <-tick.C {
		watch.call(func() { s, err = client.Status(ctx, &runtimeapi.StatusRequest{}) })
		ready := slices.ContainsFunc(s.GetStatus().GetConditions(), func(c *runtimeapi.RuntimeCondition) bool {
			return c.Type == runtimeapi.RuntimeReady && c.Status
		})
		if err != nil || ready || time.Now().After(deadline) {
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

// socket returns the type, mode and owner of a socket's file.
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

// lockHolder returns root's process with a flock(2) on a file (/proc/locks, proc_locks(5)), or 0.
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

		if _, err := p.proc.Process(pid); err == nil { // exiting processes and other namespaces do not count
			return pid
		}
	}

	return 0
}

// streaming finds the TCP addresses of the daemon and tries to connect to one of them.
func (p *Prober) streaming(ctx context.Context, pid int, cfg *config.Config) finding.Streaming {
	addrs := p.listening(pid)
	for _, own := range []string{cfg.MetricsAddress, cfg.Endpoint} {
		if tcp, isTCP := strings.CutPrefix(own, "tcp://"); isTCP {
			addrs = slices.DeleteFunc(addrs, func(a string) bool { return a == tcp })
		}
	}

	if len(addrs) == 0 {
		return finding.Streaming{} // only root can list the sockets of other users
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

// listening returns the TCP addresses of a process's listeners, in a local client's form.
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

// reachable returns the address for clients of a listener: loopback for the unspecified address.
func reachable(at netip.AddrPort) netip.AddrPort {
	switch ip := at.Addr(); {
	case ip.IsUnspecified() && ip.Is4():
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), at.Port())
	case ip.IsUnspecified():
		return netip.AddrPortFrom(netip.IPv6Loopback(), at.Port())
	}
	return at
}

// logDriver gathers the state of the log-driver process.
func (p *Prober) logDriver(ctx context.Context) finding.LogDriver {
	l := finding.LogDriver{Socket: driver.Socket, Unit: p.unitFiles("cri-docker-log.service") != nil}
	c, kind, err := dial(ctx, driver.Socket)
	if err != nil {
		l.Problem, l.Error = kind, err.Error()
		return l
	}

	if cred, err := rootonly.Peer(c); err == nil {
		l.PID = int(cred.Pid)
	}

	c.Close()
	calls, watch := p.measure(ctx, p.logDrivers)
	defer watch.end()

	var s driver.Status
	watch.call(func() { s, _, err = driver.NewClient(driver.Socket).Watch(calls, nil) })
	switch {
	case calls.Err() != nil:
		l.Problem, l.Error = finding.Silent, calls.Err().Error()
	case err != nil:
		l.Problem, l.Error = finding.Other, err.Error()
	default:
		l.PID = s.PID
	}

	l.Slow, l.Stopped = watch.slow(), watch.stopped(l.Problem)

	return l
}
