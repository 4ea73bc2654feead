package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
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
)

// Dial connects to the daemon at an endpoint of Adopted. It does not wait for an answer.
func Dial(endpoint string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient(strings.Replace(endpoint, "tcp://", "passthrough:///", 1), grpc.WithTransportCredentials(insecure.NewCredentials()))
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
			PID: x.pid, Program: x.program, Ours: p.ours(fmt.Sprintf("/proc/%d/exe", x.pid)), Judged: found.daemon != nil && found.daemon.pid == x.pid,
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
		d.Streaming = p.streaming(ctx, found.daemon.pid, cfg)
	}
	return d
}

// ask calls Version and Status.
func ask(ctx context.Context, f finding.Flags, d *finding.Daemon) (finding.Problem, string) {
	if f.Socket != "" {
		c, why, err := dial(ctx, f.Socket)
		if err != nil {
			return why, err.Error()
		}
		c.Close()
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
		d.Conditions = append(d.Conditions, finding.Condition{Type: c.Type, Status: c.Status, Reason: c.Reason, Message: c.Message})
	}
	d.Runtime = "its engine is down"
	if v, err := client.Version(ctx, &runtimeapi.VersionRequest{}); err == nil {
		d.Runtime = fmt.Sprintf("%s %s, CRI %s", v.RuntimeName, v.RuntimeVersion, v.RuntimeApiVersion)
	}
	return "", ""
}

// A daemon that has just been started is given so long to become ready, and is asked so often meanwhile.
const (
	settle = time.Second
	look   = 50 * time.Millisecond
)

// settled is the daemon's Status, which answers also while the engine is down; of one that is not ready, the last within settle.
func settled(ctx context.Context, client runtimeapi.RuntimeServiceClient) (*runtimeapi.StatusResponse, error) {
	tick := time.NewTicker(look)
	defer tick.Stop()
	for end := time.Now().Add(settle); ; <-tick.C {
		s, err := client.Status(ctx, &runtimeapi.StatusRequest{})
		ready := slices.ContainsFunc(s.GetStatus().GetConditions(), func(c *runtimeapi.RuntimeCondition) bool { return c.Type == runtimeapi.RuntimeReady && c.Status })
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

// lockHolder is the process with a flock(2) on a file (/proc/locks, proc_locks(5)), "" if there is none.
func (p *Prober) lockHolder(file string) string {
	st, err := os.Stat(p.path(file))
	if err != nil {
		return ""
	}
	sys, isUnix := st.Sys().(*syscall.Stat_t)
	if !isUnix {
		return ""
	}
	for line := range strings.Lines(p.read("/proc/locks")) {
		f := strings.Fields(line) // 1: FLOCK ADVISORY WRITE <pid> <major>:<minor>:<inode> 0 EOF
		if len(f) < 6 || f[1] != "FLOCK" {
			continue
		}
		if strings.HasSuffix(f[5], ":"+strconv.FormatUint(sys.Ino, 10)) && p.readRaw("/proc/"+f[4]+"/cmdline") != "" { // else it is ending, or elsewhere
			return f[4]
		}
	}
	return ""
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
		c, err := (&net.Dialer{Timeout: p.patience / 3}).DialContext(ctx, "tcp", a)
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
	sockets := map[string]bool{}
	for _, fd := range p.glob(fmt.Sprintf("/proc/%d/fd/*", pid)) {
		if to, err := os.Readlink(p.path(fd)); err == nil {
			if inode, isSocket := strings.CutPrefix(to, "socket:["); isSocket {
				sockets[strings.TrimSuffix(inode, "]")] = true
			}
		}
	}
	var out []string
	for _, table := range []string{"tcp", "tcp6"} {
		for line := range strings.Lines(p.read(fmt.Sprintf("/proc/%d/net/%s", pid, table))) {
			if f := strings.Fields(line); len(f) > 9 && f[3] == "0A" && sockets[f[9]] { // TCP_LISTEN
				out = append(out, reachable(f[1], table == "tcp6"))
			}
		}
	}
	return out
}

// reachable is an address of /proc/net/tcp (hexadecimal, in the machine's byte order) as a client dials it. Every address that we listen at is
// loopback's or any's, or is given by --streaming-bind-addr; only the last is read in full.
func reachable(hex string, six bool) string {
	address, port, _ := strings.Cut(hex, ":")
	n, _ := strconv.ParseUint(port, 16, 16)
	host := "127.0.0.1"
	if six {
		host = "::1"
	} else if v, err := strconv.ParseUint(address, 16, 32); err == nil && v != 0 {
		b := nativeBytes(uint32(v))
		host = net.IPv4(b[0], b[1], b[2], b[3]).String()
	}
	return net.JoinHostPort(host, strconv.FormatUint(n, 10))
}

// logDriver asks the log-driver process for its status.
func (p *Prober) logDriver(ctx context.Context) finding.LogDriver {
	l := finding.LogDriver{Socket: driver.Socket, Unit: p.unitFiles("cri-docker-log.service") != nil}
	c, why, err := dial(ctx, driver.Socket)
	if err != nil {
		l.Problem, l.Error = why, err.Error()
		return l
	}
	l.PID = peerOf(c)
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
