// Command probe tests the connections of pods and nodes.
//
//	probe serve                     answers on port 8080, TCP and UDP, with the host name
//	probe ask TARGET...             asks each target once and prints "TARGET answer"
//	probe hold TARGET               asks through one connection and prints each change
//	probe traffic TARGET            asks through a new connection each time
//
// A target is tcp://HOST:PORT or udp://HOST:PORT. Each answer is the host name of the server, or
// "error: " and the cause. A question is a line, and so is the answer. In UDP each is a datagram.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	address  = ":8080"
	timeout  = 3 * time.Second        // of a connection and of an answer
	interval = 100 * time.Millisecond // between questions of hold and traffic
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 1 && args[0] == "serve":
		return serve(ctx)
	case len(args) > 1 && args[0] == "ask":
		askAll(ctx, args[1:])
		return nil
	case len(args) == 2 && args[0] == "hold":
		return hold(ctx, args[1])
	case len(args) == 2 && args[0] == "traffic":
		return traffic(ctx, args[1])
	}

	return errors.New("usage: probe serve | ask TARGET... | hold TARGET | traffic TARGET")
}

// serve answers until ctx ends.
func serve(ctx context.Context) error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}

	var config net.ListenConfig
	packets, err := config.ListenPacket(ctx, "udp", address)
	if err != nil {
		return err
	}
	defer packets.Close()

	l, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer l.Close()

	failed := make(chan error, 2)
	go func() { failed <- servePackets(packets, name) }()
	go func() { failed <- serveConnections(l, name) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil
	}
}

func servePackets(packets net.PacketConn, name string) error {
	question := make([]byte, 16)
	for {
		_, from, err := packets.ReadFrom(question)
		if err != nil {
			return err
		}
		if _, err := packets.WriteTo([]byte(name+"\n"), from); err != nil {
			fmt.Fprintln(os.Stderr, "probe:", err) // one client's problem
		}
	}
}

func serveConnections(l net.Listener, name string) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}

		go func() {
			defer conn.Close()
			for r := bufio.NewReader(conn); ; {
				if _, err := r.ReadString('\n'); err != nil {
					return
				}
				if _, err := io.WriteString(conn, name+"\n"); err != nil {
					return
				}
			}
		}()
	}
}

// dial connects to a target.
func dial(ctx context.Context, target string) (net.Conn, error) {
	network, hostPort, found := strings.Cut(target, "://")
	if !found || network != "tcp" && network != "udp" {
		return nil, fmt.Errorf("target %q: neither tcp:// nor udp://", target)
	}

	return (&net.Dialer{Timeout: timeout}).DialContext(ctx, network, hostPort)
}

// ask sends a question and returns the answer.
func ask(conn net.Conn) (string, error) {
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, "?\n"); err != nil {
		return "", err
	}

	answer := make([]byte, 0, 256)
	for len(answer) == 0 || answer[len(answer)-1] != '\n' {
		n, err := conn.Read(answer[len(answer):cap(answer)])
		if err != nil {
			return "", err
		}
		if answer = answer[:len(answer)+n]; len(answer) == cap(answer) {
			return "", errors.New("the answer is too long")
		}
	}

	return strings.TrimSuffix(string(answer), "\n"), nil
}

// askOnce asks through a new connection.
func askOnce(ctx context.Context, target string) (string, error) {
	conn, err := dial(ctx, target)
	if err != nil {
		return "", err
	}
	defer conn.Close()

	return ask(conn)
}

// askAll asks all targets at once.
func askAll(ctx context.Context, targets []string) {
	answers := make([]string, len(targets))
	var wg sync.WaitGroup
	for i, t := range targets {
		wg.Go(func() {
			answer, err := askOnce(ctx, t)
			if err != nil {
				answer = "error: " + err.Error()
			}
			answers[i] = answer
		})
	}

	wg.Wait()
	for i, t := range targets {
		fmt.Println(t, answers[i])
	}
}

// hold asks through one connection and prints each change of the answer. It keeps a connection that
// is silent, and replaces one that reports an error, like most clients.
func hold(ctx context.Context, target string) error {
	var conn net.Conn
	last := ""
	for ; ctx.Err() == nil; time.Sleep(interval) {
		answer, err := "", error(nil)
		if conn == nil {
			conn, err = dial(ctx, target)
		}
		if err == nil {
			answer, err = ask(conn)
		}

		if err != nil {
			answer = "error: " + err.Error()
		}
		if conn != nil && err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			conn.Close()
			conn = nil
		}

		if answer != last {
			fmt.Println(answer)
			last = answer
		}
	}

	return nil
}

// traffic asks through new connections. It prints each error, and "ok" for the first answer after
// the start and after errors.
func traffic(ctx context.Context, target string) error {
	failing := true
	for ; ctx.Err() == nil; time.Sleep(interval) {
		_, err := askOnce(ctx, target)
		switch {
		case err != nil:
			fmt.Println("error:", err)
		case failing:
			fmt.Println("ok")
		}
		failing = err != nil
	}

	return nil
}
